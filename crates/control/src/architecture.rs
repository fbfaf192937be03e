//! Processor architectures: which one an image asks for, and which one this host builds and runs.
//!
//! MicroVMs run on the host's own processor, so that every build is for that. A build's `architecture` is the target that was asked for, as the
//! service's model has it: clients look for their builds by it. The build's log and its state reason say what it was built for.

use serde::{Deserialize, Serialize};

use crate::types::ImageSpec;

/// Architecture of a processor, by the service's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Architecture {
    #[serde(rename = "ARM_64")]
    Arm64,
    #[serde(rename = "X86_64")]
    X86_64,
}

/// What becomes of an image that asks for another architecture than the host's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Architectures {
    /// It is built for the host's, and its log says so.
    #[default]
    Host,
    /// It is refused.
    Strict,
}

impl Architecture {
    /// The host's own.
    pub const HOST: Self = if cfg!(target_arch = "aarch64") { Self::Arm64 } else { Self::X86_64 };
    pub const ALL: [Self; 2] = [Self::Arm64, Self::X86_64];

    /// The service's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Arm64 => "ARM_64",
            Self::X86_64 => "X86_64",
        }
    }

    /// The service's chipset of that architecture.
    pub const fn chipset(self) -> &'static str {
        match self {
            Self::Arm64 => "GRAVITON",
            Self::X86_64 => "INTEL",
        }
    }

    /// What Dockerfiles and registries call it.
    pub const fn platform(self) -> &'static str {
        match self {
            Self::Arm64 => "linux/arm64",
            Self::X86_64 => "linux/amd64",
        }
    }
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Architectures {
    /// Those that an image may ask for, the host's first.
    pub fn offered(self) -> Vec<Architecture> {
        let others = Architecture::ALL.into_iter().filter(|other| *other != Architecture::HOST && self == Self::Host);
        std::iter::once(Architecture::HOST).chain(others).collect()
    }

    /// Why a specification is refused, if it is.
    pub(crate) fn refusal(self, spec: &ImageSpec) -> Option<String> {
        let offered = self.offered();
        let foreign = spec.architectures().into_iter().find(|asked| !offered.contains(asked))?;
        Some(format!(
            "The requested CPU architecture {foreign} is not supported by base MicroVM image {}. Supported CPU architectures are: [{}]. \
             This server's setting architectures is \"strict\".",
            spec.base_image_arn,
            Architecture::HOST
        ))
    }
}

impl ImageSpec {
    /// Architectures that were asked for, the host's first; the host's if none was.
    pub fn architectures(&self) -> Vec<Architecture> {
        let named = self.echoed.get("cpuConfigurations").and_then(serde_json::Value::as_array).into_iter().flatten();
        let mut asked: Vec<Architecture> =
            named.filter_map(|configuration| Architecture::deserialize(&configuration["architecture"]).ok()).collect();
        asked.sort_by_key(|architecture| *architecture != Architecture::HOST);
        asked.dedup();
        if asked.is_empty() {
            asked.push(Architecture::HOST);
        }
        asked
    }

    /// The architecture that was asked for in vain, if one was.
    pub(crate) fn foreign_architecture(&self) -> Option<Architecture> {
        self.architectures().into_iter().find(|asked| *asked != Architecture::HOST)
    }
}

/// What the log of a build says that is for another architecture than was asked for.
pub(crate) fn notice(asked: Architecture) -> [String; 2] {
    let host = Architecture::HOST;
    [
        format!("{asked} was asked for, and this host's processor is {host}: the image is built and run for {host} ({}).", host.platform()),
        format!(
            "Programs and packages for {} do not run in it: take those for {} instead, or build on a host with {asked}.",
            asked.platform(),
            host.platform()
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::spec;

    const OTHER: Architecture = if cfg!(target_arch = "aarch64") { Architecture::X86_64 } else { Architecture::Arm64 };

    fn asking(architectures: &[Architecture]) -> ImageSpec {
        let configurations: Vec<_> = architectures.iter().map(|name| serde_json::json!({"architecture": name})).collect();
        let mut spec = spec("demo");
        spec.echoed.insert("cpuConfigurations".to_owned(), configurations.into());
        spec
    }

    #[test]
    fn architectures_asked_for_come_with_the_host_s_first() {
        let host = Architecture::HOST;
        assert_eq!(spec("demo").architectures(), [host]);
        assert_eq!(asking(&[]).architectures(), [host]);
        assert_eq!(asking(&[OTHER]).architectures(), [OTHER]);
        assert_eq!(asking(&[OTHER, host, OTHER]).architectures(), [host, OTHER]);
    }

    #[test]
    fn strict_refuses_every_architecture_but_the_host_s() {
        assert_eq!(Architectures::Strict.offered(), [Architecture::HOST]);
        assert_eq!(Architectures::Host.offered(), [Architecture::HOST, OTHER]);
        for asked in [&[OTHER][..], &[Architecture::HOST, OTHER]] {
            assert_eq!(Architectures::Host.refusal(&asking(asked)), None);
            let refusal = Architectures::Strict.refusal(&asking(asked)).unwrap();
            assert!(refusal.starts_with(&format!("The requested CPU architecture {OTHER} is not supported")), "{refusal}");
        }
        assert_eq!(Architectures::Strict.refusal(&asking(&[Architecture::HOST])), None);
        assert_eq!(Architectures::Strict.refusal(&spec("demo")), None);
    }
}
