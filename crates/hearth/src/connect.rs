//! `connect.json`: how to reach a server that can serve. It is there while it can, and nobody but its owner may read it.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::data_dir::{DataDir, write_secret};

/// What a client needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Connect {
    /// URL of the AWS APIs, without a slash at its end.
    pub api: String,
    /// Address of the endpoints' listener, for `curl --connect-to`.
    pub endpoint: SocketAddr,
    /// Certificate of the local certificate authority.
    pub ca: PathBuf,
    /// The server's region.
    pub region: String,
    /// The server's account.
    pub account: String,
    /// Access key of the administrator.
    pub access_key_id: String,
    /// Its secret.
    pub secret_access_key: String,
    /// The server's process.
    pub pid: u32,
}

/// No server can be reached in a data directory.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// nothing serves here
    #[error(
        "no hearth serves {dir}: start one with `hearth serve --data-dir {dir}`, or name its directory with --data-dir or HEARTH_DATA_DIR"
    )]
    NotServing {
        /// The data directory.
        dir: PathBuf,
    },
    /// somebody else's server
    #[error("{path} may not be read by this user: run this as the user that runs the server, for example with sudo")]
    Forbidden {
        /// The file.
        path: PathBuf,
    },
    /// the file cannot be read
    #[error("reading {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// the file is not what a server writes
    #[error("{path} is not understood ({reason}): is the server of another version?")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Connect {
    /// Reads what the server of a data directory says.
    pub fn read(dir: &DataDir) -> Result<Self, ConnectError> {
        let path = dir.connect();
        let not_serving = || ConnectError::NotServing { dir: dir.path().to_owned() };
        let text = fs::read(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => not_serving(),
            io::ErrorKind::PermissionDenied => ConnectError::Forbidden { path: path.clone() },
            _ => ConnectError::Io { path: path.clone(), source },
        })?;
        let connect: Self =
            serde_json::from_slice(&text).map_err(|error| ConnectError::Damaged { path: path.clone(), reason: error.to_string() })?;
        // A server that was killed leaves its file behind.
        if Path::new("/proc").join(connect.pid.to_string()).exists() { Ok(connect) } else { Err(not_serving()) }
    }

    /// Says that the server can serve.
    pub fn publish(&self, dir: &DataDir) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        write_secret(&dir.connect(), &text)
    }

    /// Says that it cannot any more.
    pub fn withdraw(dir: &DataDir) -> io::Result<()> {
        match fs::remove_file(dir.connect()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// What a URL says after an endpoint's name: nothing where the listener has the port that `https` means.
    pub fn url_port(&self) -> String {
        if self.endpoint.port() == 443 { String::new() } else { format!(":{}", self.endpoint.port()) }
    }
}

#[cfg(test)]
pub mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// What a server of this process would say.
    pub fn example() -> Connect {
        Connect {
            api: "http://127.0.0.1:8470".to_owned(),
            endpoint: "127.0.0.1:8443".parse().unwrap(),
            ca: "/data/ca/ca.pem".into(),
            region: "us-east-1".to_owned(),
            account: "000000000000".to_owned(),
            access_key_id: "AKIA".to_owned(),
            secret_access_key: "it's".to_owned(),
            pid: std::process::id(),
        }
    }

    #[test]
    fn what_is_published_is_private_and_read_back_until_withdrawn() {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::new(root.path().to_owned());
        example().publish(&dir).unwrap();
        assert_eq!(fs::metadata(dir.connect()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Connect::read(&dir).unwrap(), example());
        Connect::withdraw(&dir).unwrap();
        Connect::withdraw(&dir).unwrap();
        assert!(matches!(Connect::read(&dir), Err(ConnectError::NotServing { .. })));
    }

    #[test]
    fn the_names_are_the_documented_ones() {
        let value = serde_json::to_value(example()).unwrap();
        let names: Vec<&String> = value.as_object().unwrap().keys().collect();
        assert_eq!(names, ["accessKeyId", "account", "api", "ca", "endpoint", "pid", "region", "secretAccessKey"]);
        assert_eq!(value["endpoint"], "127.0.0.1:8443");
    }

    #[test]
    fn what_a_killed_server_left_behind_is_not_believed() {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::new(root.path().to_owned());
        // No process has this id: the kernel's limit is 4194304.
        Connect { pid: 4_194_305, ..example() }.publish(&dir).unwrap();
        assert!(matches!(Connect::read(&dir), Err(ConnectError::NotServing { .. })));
    }
}
