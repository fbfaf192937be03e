//! The sizes of MicroVMs (SPEC 6.3), as far as the host has them. They are decided when an image is built; its snapshot keeps them.

use crate::settings::GuestSize;

/// What a MicroVM has, by the memory its image asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Virtual processors.
    pub vcpus: u8,
    /// What the guest sees, in MiB.
    pub memory_mib: u32,
    /// Size of the file system, in bytes.
    pub disk_bytes: u64,
}

/// There is no such MicroVM here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ShapeError {
    /// the service does not offer it
    #[error("The requested memory size is not supported.")]
    Unknown,
    /// the host cannot hold it
    #[error(
        "The requested memory size of {requested_mib} MiB is more than the {most_mib} MiB that MicroVMs may have on this host. \
         Use a smaller size, or a host with more memory."
    )]
    TooLarge {
        /// What was asked for.
        requested_mib: u32,
        /// What there is.
        most_mib: u64,
    },
}

/// What the host has for one MicroVM at most, and what the guests are to see of a size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub guest: GuestSize,
    pub most_vcpus: u8,
    pub most_memory_mib: u64,
}

const GIB: u64 = 1 << 30;
/// Peak memory as a multiple of the baseline.
const PEAK: u32 = 4;
/// What a guest's memory is a multiple of when the host limits it, in MiB.
const STEP_MIB: u64 = 128;

impl Sizes {
    /// The shape of a memory size in MiB; only five sizes exist.
    pub fn shape(&self, memory_mib: u32) -> Result<Shape, ShapeError> {
        // AWS's vCPUs are quarters of what the guest sees; a guest has whole ones.
        let (baseline_vcpus, peak_vcpus, disk_gib) = match memory_mib {
            512 => (1, 1, 8),
            1024 => (1, 2, 8),
            2048 => (1, 4, 8),
            4096 => (2, 8, 16),
            8192 => (4, 16, 32),
            _ => return Err(ShapeError::Unknown),
        };
        if u64::from(memory_mib) > self.most_memory_mib {
            return Err(ShapeError::TooLarge { requested_mib: memory_mib, most_mib: self.most_memory_mib });
        }
        let (vcpus, wanted_mib) = match self.guest {
            GuestSize::Baseline => (baseline_vcpus, memory_mib),
            GuestSize::Peak => (peak_vcpus, memory_mib * PEAK),
        };
        let most_mib = u32::try_from(self.most_memory_mib - self.most_memory_mib % STEP_MIB).unwrap_or(u32::MAX);
        Ok(Shape {
            vcpus: vcpus.min(self.most_vcpus.max(1)),
            memory_mib: wanted_mib.min(most_mib).max(memory_mib),
            disk_bytes: disk_gib * GIB,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: Sizes = Sizes { guest: GuestSize::Baseline, most_vcpus: 64, most_memory_mib: 1 << 20 };

    fn all(sizes: Sizes) -> Vec<(u8, u32, u64)> {
        [512, 1024, 2048, 4096, 8192]
            .into_iter()
            .filter_map(|size| sizes.shape(size).ok())
            .map(|shape| (shape.vcpus, shape.memory_mib, shape.disk_bytes >> 30))
            .collect()
    }

    #[test]
    fn five_sizes_exist() {
        assert_eq!(all(LARGE), [(1, 512, 8), (1, 1024, 8), (1, 2048, 8), (2, 4096, 16), (4, 8192, 32)]);
        for other in [0, 256, 3000, 16384] {
            assert_eq!(LARGE.shape(other), Err(ShapeError::Unknown));
        }
    }

    #[test]
    fn at_its_peak_a_guest_sees_four_times_as_much() {
        let peak = Sizes { guest: GuestSize::Peak, ..LARGE };
        assert_eq!(all(peak), [(1, 2048, 8), (2, 4096, 8), (4, 8192, 8), (8, 16384, 16), (16, 32768, 32)]);
    }

    #[test]
    fn the_host_is_the_limit() {
        let small = Sizes { most_vcpus: 2, most_memory_mib: 4500, ..LARGE };
        assert_eq!(all(small), [(1, 512, 8), (1, 1024, 8), (1, 2048, 8), (2, 4096, 16)]);
        assert_eq!(small.shape(8192), Err(ShapeError::TooLarge { requested_mib: 8192, most_mib: 4500 }));
        let peak = Sizes { guest: GuestSize::Peak, ..small };
        assert_eq!(all(peak), [(1, 2048, 8), (2, 4096, 8), (2, 4480, 8), (2, 4480, 16)]);
    }
}
