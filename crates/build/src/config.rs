//! What an image says about running it, and where its layers are, out of `docker image inspect`.

use std::{collections::BTreeSet, str::FromStr};

use nix::sys::signal::Signal;
use oci_spec::image::Config;
use serde::Deserialize;

use crate::{BuildError, ImageConfig};

/// Most ports that EXPOSE may name; more is a mistake or an attack.
const MAX_PORTS: usize = 1024;

/// The image's configuration cannot be followed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("the description of the image is not understood: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("its layers are with the storage driver {0}, not with overlay2")]
    NoLayers(String),
    #[error("neither ENTRYPOINT nor CMD")]
    NothingToRun,
    #[error("STOPSIGNAL {0} is not a signal")]
    StopSignal(String),
    #[error("EXPOSE {0} is not a port")]
    Port(String),
}

/// An image as it is described.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Description {
    pub(crate) config: ImageConfig,
    /// Directories of its layers below the layer directory, the last one first.
    pub(crate) layers: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspect {
    #[serde(default)]
    config: Option<Config>,
    graph_driver: GraphDriver,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GraphDriver {
    name: String,
    #[serde(default)]
    data: Option<Layers>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Layers {
    upper_dir: String,
    #[serde(default)]
    lower_dir: Option<String>,
}

/// Reads the output of `docker image inspect` of one image.
pub(crate) fn parse(inspect: &[u8]) -> Result<Description, ConfigError> {
    let [image] = serde_json::from_slice::<[Inspect; 1]>(inspect)?;
    let data = image.graph_driver.data.ok_or(ConfigError::NoLayers(image.graph_driver.name))?;
    let dirs = [Some(data.upper_dir), data.lower_dir].into_iter().flatten();
    let layers = dirs.flat_map(|dirs| dirs.split(':').map(relative).collect::<Vec<_>>()).collect();
    Ok(Description { config: run_configuration(image.config.unwrap_or_default())?, layers })
}

/// Path of a layer below the layer directory: `<id>/diff`.
fn relative(dir: &str) -> String {
    let mut parts = dir.rsplit('/');
    let (last, id) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    format!("{id}/{last}")
}

fn run_configuration(config: Config) -> Result<ImageConfig, ConfigError> {
    // The shell forms of ENTRYPOINT and CMD arrive as ["/bin/sh", "-c", …] already.
    let mut argv = config.entrypoint().clone().unwrap_or_default();
    argv.extend(config.cmd().clone().unwrap_or_default());
    if argv.is_empty() {
        return Err(ConfigError::NothingToRun);
    }
    let env = config.env().iter().flatten();
    let env = env.filter_map(|entry| entry.split_once('=')).map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let cwd = config.working_dir().clone().filter(|dir| !dir.is_empty()).unwrap_or_else(|| "/".to_owned());
    let stop_signal = match config.stop_signal().as_deref() {
        None | Some("") => Signal::SIGTERM as i32,
        Some(name) => signal_number(name).ok_or_else(|| ConfigError::StopSignal(name.to_owned()))?,
    };
    let mut exposed_ports = BTreeSet::new();
    for entry in config.exposed_ports().iter().flatten() {
        exposed_ports.extend(tcp_ports(entry).ok_or_else(|| ConfigError::Port(entry.clone()))?);
        if exposed_ports.len() > MAX_PORTS {
            return Err(ConfigError::Port(entry.clone()));
        }
    }
    let user = config.user().clone().unwrap_or_default();
    Ok(ImageConfig { argv, env, cwd, user, stop_signal, exposed_ports: exposed_ports.into_iter().collect() })
}

impl From<ConfigError> for BuildError {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::NothingToRun => Self::NothingToRun,
            ConfigError::Malformed(_) | ConfigError::NoLayers(_) => Self::Platform(Box::new(error)),
            error => Self::ConfigInvalid(error.to_string()),
        }
    }
}

/// `SIGTERM`, `TERM`, `15` and `RTMIN+3` as Linux numbers them.
fn signal_number(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = name.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    // As the C library hands them out: it keeps 32 and 33 for itself.
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let offset = if offset.is_empty() { 0 } else { offset.strip_prefix('+')?.parse::<i32>().ok()? };
        return (0..=30).contains(&offset).then_some(34 + offset);
    }
    Signal::from_str(&format!("SIG{name}")).ok().map(|signal| signal as i32)
}

/// Ports of `5000`, `5000/tcp` or `5000-5003/tcp`; none for `/udp`. `None` if it is no port.
fn tcp_ports(entry: &str) -> Option<impl Iterator<Item = u16> + use<>> {
    let (range, protocol) = entry.split_once('/').unwrap_or((entry, "tcp"));
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (first, last) = (first.parse::<u16>().ok()?, last.parse::<u16>().ok()?);
    let is_tcp = protocol.eq_ignore_ascii_case("tcp");
    (1 <= first && first <= last).then(|| (first..=last).filter(move |_| is_tcp))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_config(config: serde_json::Value) -> Result<ImageConfig, ConfigError> {
        let data = serde_json::json!({ "UpperDir": "/var/lib/docker/overlay2/a/diff", "LowerDir": "/o/b/diff:/o/c/diff" });
        let image = serde_json::json!([{ "Id": "sha256:1", "Config": config, "GraphDriver": { "Name": "overlay2", "Data": data } }]);
        let description = parse(image.to_string().as_bytes())?;
        assert_eq!(description.layers, ["a/diff", "b/diff", "c/diff"]);
        Ok(description.config)
    }

    #[test]
    fn everything_said() {
        let config = parse_config(serde_json::json!({
            "Entrypoint": ["/app"], "Cmd": ["serve", "--fast"], "Env": ["PATH=/bin", "EMPTY=", "EQUALS=a=b", "nonsense"],
            "WorkingDir": "/srv", "User": "app:www", "StopSignal": "SIGQUIT",
            "ExposedPorts": { "8080/tcp": {}, "53/udp": {}, "443": {}, "9000-9002/tcp": {} },
        }));
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let expected = ImageConfig {
            argv: ["/app", "serve", "--fast"].map(str::to_owned).to_vec(),
            env: vec![pair("PATH", "/bin"), pair("EMPTY", ""), pair("EQUALS", "a=b")],
            cwd: "/srv".to_owned(),
            user: "app:www".to_owned(),
            stop_signal: 3,
            exposed_ports: vec![443, 8080, 9000, 9001, 9002],
        };
        assert_eq!(config.unwrap(), expected);
    }

    #[test]
    fn nothing_but_a_command() {
        let config = parse_config(serde_json::json!({ "Cmd": ["/bin/sh", "-c", "exec app"] })).unwrap();
        assert_eq!(config.argv, ["/bin/sh", "-c", "exec app"]);
        assert_eq!((config.cwd.as_str(), config.user.as_str(), config.stop_signal), ("/", "", 15));
        assert!(config.env.is_empty() && config.exposed_ports.is_empty());
    }

    #[test]
    fn an_image_without_a_command_is_refused() {
        for config in [serde_json::json!({}), serde_json::json!({ "Cmd": [] }), serde_json::json!(null)] {
            assert!(matches!(parse_config(config), Err(ConfigError::NothingToRun)));
        }
    }

    #[test]
    fn signals() {
        let known = [("SIGTERM", 15), ("int", 2), ("9", 9), ("SIGRTMIN+3", 37), ("RTMIN", 34)];
        for (name, number) in known {
            assert_eq!(signal_number(name), Some(number), "{name}");
        }
        for name in ["", "0", "65", "SIGNOTHING", "RTMIN+31", "RTMIN-1", "-9"] {
            assert_eq!(signal_number(name), None, "{name}");
        }
    }

    #[test]
    fn wrong_ports_are_refused() {
        for entry in ["0/tcp", "65536", "http", "9-8", "", "1-65535/tcp"] {
            let config = parse_config(serde_json::json!({ "Cmd": ["a"], "ExposedPorts": { entry: {} } }));
            assert!(matches!(config, Err(ConfigError::Port(_))), "{entry}");
        }
    }
}
