//! Which kernel modules the guest needs, and in which order they can be inserted.

use anyhow::{Result, bail};

/// What `microvm` machines have, and what applications may expect of a kernel.
pub const WANTED: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "veth",
    "ext4",
    "unix",
    "ipv6",
    "af_packet",
    "tcp_diag",
    "overlay",
    "fuse",
    "loop",
];

/// What the image builder needs besides when it is in a machine: a bridge for the steps of a build, and address translation.
pub const FOR_BUILDER: &[&str] = &["bridge", "nf_tables", "nft_chain_nat", "nft_masq", "nft_nat", "nft_reject_ipv4"];

/// Files of the wanted modules and their dependencies, each after those it depends on; paths are relative to the kernel's module directory.
/// `dep` and `builtin` are the texts of `modules.dep` and `modules.builtin` (modules.dep(5)).
pub fn in_order<'a>(wanted: &[&str], dep: &'a str, builtin: &str) -> Result<Vec<&'a str>> {
    let mut order = Vec::new();
    for module in wanted {
        let found = dep.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| name(file) == *module);
        match found {
            // The last dependency is the one to insert first.
            Some((file, dependencies)) => {
                for file in dependencies.split_whitespace().rev().chain([file]) {
                    if !order.contains(&file) {
                        order.push(file);
                    }
                }
            }
            None if builtin.lines().any(|file| name(file) == *module) => {}
            None => bail!("the kernel has no module {module}, neither to load nor built in"),
        }
    }
    Ok(order)
}

/// The module's name: its file's, without the extension, and with underscores for dashes.
fn name(file: &str) -> String {
    let file = file.rsplit('/').next().unwrap_or(file);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/virtio.ko:\nkernel/virtio_ring.ko: kernel/virtio.ko\nkernel/net_failover.ko: kernel/failover.ko\nkernel/failover.ko:\nkernel/net/virtio_net.ko: kernel/net_failover.ko kernel/failover.ko kernel/virtio_ring.ko kernel/virtio.ko\nkernel/virtio-rng.ko.xz: kernel/virtio_ring.ko kernel/virtio.ko\n";

    #[test]
    fn dependencies_come_first_and_once() {
        assert_eq!(
            in_order(&["virtio_net", "virtio_rng", "ext4"], DEP, "kernel/fs/ext4/ext4.ko\n").unwrap(),
            [
                "kernel/virtio.ko",
                "kernel/virtio_ring.ko",
                "kernel/failover.ko",
                "kernel/net_failover.ko",
                "kernel/net/virtio_net.ko",
                "kernel/virtio-rng.ko.xz"
            ]
        );
    }

    #[test]
    fn a_module_that_is_nowhere_is_an_error() {
        assert!(in_order(&["ext4"], DEP, "").unwrap_err().to_string().contains("no module ext4"));
    }
}
