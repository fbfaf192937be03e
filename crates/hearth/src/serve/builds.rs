//! How image builds run: in what, with how much memory, and how many at once.

use std::path::PathBuf;

use anyhow::Context;
use hearth_build::{Builder, BuilderConfig, KitFile};
use hearth_control::{BuildMachineSettings, HostMemory, Settings};
use hearth_machine::{kit::Kit, qemu::Accelerator};

use crate::{config::ServeConfig, data_dir::DataDir};

/// Most virtual processors of a build's MicroVM.
const MOST_VCPUS: usize = 4;
/// Least and most memory of it, in MiB, unless the operator says it.
const LEAST_MIB: u64 = 1024;
const MOST_MIB: u64 = 4096;

/// The image builder, made ready.
pub async fn builder(config: &ServeConfig, dir: &DataDir, kit: &Kit, accelerator: Accelerator) -> anyhow::Result<Builder> {
    let cache = config.build_cache_dir.clone().unwrap_or_else(|| dir.build_cache());
    let file = |(path, sha256): (PathBuf, &str)| KitFile { path, sha256: sha256.to_owned() };
    let mut builder_config = BuilderConfig::new(cache, file(kit.base_image()), file(kit.builder()));
    builder_config.deadline = config.build_timeout();
    builder_config.cache = config.build_cache.limits();
    builder_config.disk_reserve = u64::from(config.build_disk_reserve_mib) << 20;
    builder_config.registries = config.registries.registries();
    builder_config.machines = config.build_isolation.is_microvm(accelerator);
    builder_config.memory = memory_mib(config, dir, builder_config.machines).map(|mib| mib << 20);
    builder_config.limits = config.archive_limits();
    let builder = Builder::new(builder_config);
    builder.prepare().await.context("preparing the image builder")?;
    Ok(builder)
}

/// Builds that run at once.
pub fn at_once(config: &ServeConfig, dir: &DataDir) -> usize {
    let configured = config.max_concurrent_builds.and_then(|builds| usize::try_from(builds).ok());
    configured.unwrap_or_else(|| Settings::new(dir.path().to_owned()).max_concurrent_builds).max(1)
}

/// The MicroVM that each build runs in, if they do.
pub fn machine(config: &ServeConfig, dir: &DataDir, accelerator: Accelerator) -> Option<BuildMachineSettings> {
    if !config.build_isolation.is_microvm(accelerator) {
        return None;
    }
    let memory_mib = memory_mib(config, dir, true).unwrap_or(LEAST_MIB);
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(MOST_VCPUS);
    Some(BuildMachineSettings {
        memory_mib: u32::try_from(memory_mib).unwrap_or(u32::MAX),
        vcpus: u8::try_from(processors).expect("there are at most four"),
    })
}

/// Most memory of a build; `None` if the host hides its own, and builds are not limited then.
fn memory_mib(config: &ServeConfig, dir: &DataDir, machines: bool) -> Option<u64> {
    let builds = at_once(config, dir) as u64;
    let share = |host: HostMemory| match machines {
        true => (host.total_mib / 4 / builds).clamp(LEAST_MIB, MOST_MIB),
        false => host.total_mib / 4 * 3 / builds,
    };
    config.build_memory_mib.map(u64::from).or_else(|| HostMemory::read().map(share))
}
