//! The sizes of MicroVMs (SPEC 6.3).

/// What a MicroVM has, by the memory its image asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub vcpus: u8,
    /// Size of the file system, in bytes.
    pub disk_bytes: u64,
}

const GIB: u64 = 1 << 30;

impl Shape {
    /// The shape of a memory size in MiB; only five sizes exist.
    pub fn of(memory_mib: u32) -> Option<Self> {
        let (vcpus, disk_gib) = match memory_mib {
            512 | 1024 | 2048 => (1, 8),
            4096 => (2, 16),
            8192 => (4, 32),
            _ => return None,
        };
        Some(Self { vcpus, disk_bytes: disk_gib * GIB })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_sizes_exist() {
        assert_eq!(Shape::of(2048), Some(Shape { vcpus: 1, disk_bytes: 8 << 30 }));
        assert_eq!(Shape::of(8192), Some(Shape { vcpus: 4, disk_bytes: 32 << 30 }));
        assert_eq!(Shape::of(0), None);
        assert_eq!(Shape::of(3000), None);
    }
}
