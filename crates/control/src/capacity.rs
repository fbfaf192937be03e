//! Whether the host has memory for one more MicroVM.

use crate::error::ControlError;

/// Fails unless the host could give `needed_mib` and keep `reserve_mib`.
pub(crate) fn check(needed_mib: u32, reserve_mib: u64) -> Result<(), ControlError> {
    // A file of the kernel's own memory: reading it waits for no disk. A host that hides it gets no check.
    let Some(available) = std::fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(available_mib) else { return Ok(()) };
    if available >= u64::from(needed_mib) + reserve_mib {
        return Ok(());
    }
    Err(ControlError::InsufficientCapacity(format!(
        "The host has {available} MiB of memory available and keeps {reserve_mib} MiB in reserve, the MicroVM needs {needed_mib} MiB. \
         Suspend or terminate MicroVMs, or use an image with less memory."
    )))
}

/// `MemAvailable` of /proc/meminfo (proc_meminfo(5)), in MiB.
fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        assert_eq!(available_mib("MemTotal: 10 kB\nMemAvailable:    2048000 kB\n"), Some(2000));
        assert_eq!(available_mib("MemTotal: 10 kB\n"), None);
    }

    #[test]
    fn a_host_without_room_says_what_to_do() {
        assert!(check(1, 0).is_ok());
        let error = check(512, u64::from(u32::MAX)).unwrap_err();
        assert!(error.to_string().contains("terminate MicroVMs"), "{error}");
    }
}
