//! Tells a KVM that runs guest kernels from one that only says it does.
//!
//! Some hosts offer `/dev/kvm` but run the guest's ring 0 by emulating its instructions, slowly and not all of them; stock kernels die there.
//! The probe runs a counting loop in ring 0 of a scratch machine and times it.

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

/// Iterations of the loop; two instructions each.
const ITERATIONS: u32 = 300_000;
/// Slower than this is emulation. Native processors need less than 2 ns, emulation over 100 ns.
const NATIVE_NS: f64 = 20.0;
/// How long the probe may take. Emulation needs about 0.1 s.
const DEADLINE: Duration = Duration::from_secs(5);

/// What `/dev/kvm` is good for.
#[derive(Debug, Clone, PartialEq)]
pub enum KvmProbe {
    /// Guest kernels run natively; the figure is nanoseconds per iteration.
    Native(f64),
    /// Guest kernels are emulated; the figure is nanoseconds per iteration.
    Emulated(f64),
    /// It does not work.
    Unusable(String),
}

impl std::fmt::Display for KvmProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Native(ns) => write!(f, "/dev/kvm runs guest kernels natively ({ns:.1} ns an iteration)"),
            Self::Emulated(ns) => write!(f, "/dev/kvm opens, but emulates guest kernels ({ns:.0} ns an iteration; native is under 2)"),
            Self::Unusable(reason) => write!(f, "/dev/kvm does not work: {reason}"),
        }
    }
}

/// Probes `/dev/kvm`. Blocks for up to some seconds.
pub fn probe_kvm() -> KvmProbe {
    let (report, result) = mpsc::channel();
    let probe = move || {
        let _ = report.send(time_loop());
    };
    // A vCPU that never returns keeps its thread, which is idle from then on; the process can still end.
    if let Err(error) = thread::Builder::new().name("kvm-probe".into()).spawn(probe) {
        return KvmProbe::Unusable(error.to_string());
    }
    match result.recv_timeout(DEADLINE) {
        Ok(Ok(ns)) if ns < NATIVE_NS => KvmProbe::Native(ns),
        Ok(Ok(ns)) => KvmProbe::Emulated(ns),
        Ok(Err(reason)) => KvmProbe::Unusable(reason),
        Err(_) => KvmProbe::Unusable(format!("a scratch machine did not finish within {} s", DEADLINE.as_secs())),
    }
}

/// Nanoseconds per iteration of `dec ecx; jnz` in 32-bit protected mode.
fn time_loop() -> Result<f64, String> {
    let refused = |what: &'static str| move |error: kvm_ioctls::Error| format!("{what}: {error}");
    let kvm = Kvm::new().map_err(refused("opening it"))?;
    let vm = kvm.create_vm().map_err(refused("making a machine"))?;
    let size = std::num::NonZero::new(4096).expect("not zero");
    let mut code = vec![0xb9];
    code.extend_from_slice(&ITERATIONS.to_le_bytes());
    code.extend_from_slice(&[0x49, 0x75, 0xfd, 0xf4]);
    let (protection, flags) = {
        use nix::sys::mman::{MapFlags, ProtFlags};
        (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
    };
    // SAFETY: a new mapping at an address of the kernel's choice; it is unmapped only when the process ends, after the machine.
    let page = unsafe { nix::sys::mman::mmap_anonymous(None, size, protection, flags) }.map_err(|error| error.to_string())?.cast::<u8>();
    // SAFETY: the page is ours and longer than the code.
    unsafe { page.copy_from_nonoverlapping(std::ptr::NonNull::from(code.as_slice()).cast(), code.len()) };
    let region =
        kvm_userspace_memory_region { slot: 0, flags: 0, guest_phys_addr: 0x1000, memory_size: 4096, userspace_addr: page.as_ptr() as u64 };
    // SAFETY: the region is the page mapped above, which outlives the machine.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("giving it memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(refused("making a processor"))?;
    let mut special = vcpu.get_sregs().map_err(refused("reading its registers"))?;
    special.cr0 |= 1;
    for segment in [&mut special.cs, &mut special.ds, &mut special.es, &mut special.ss] {
        segment.base = 0;
        segment.limit = 0xffff_ffff;
        segment.g = 1;
        segment.db = 1;
        segment.s = 1;
        segment.present = 1;
        segment.dpl = 0;
    }
    (special.cs.type_, special.cs.selector) = (0xb, 8);
    for segment in [&mut special.ds, &mut special.es, &mut special.ss] {
        (segment.type_, segment.selector) = (3, 16);
    }
    vcpu.set_sregs(&special).map_err(refused("setting its registers"))?;
    let mut registers = vcpu.get_regs().map_err(refused("reading its registers"))?;
    (registers.rip, registers.rflags) = (0x1000, 2);
    vcpu.set_regs(&registers).map_err(refused("setting its registers"))?;
    let start = Instant::now();
    match vcpu.run().map_err(refused("running it"))? {
        VcpuExit::Hlt => Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(ITERATIONS)),
        other => Err(format!("the processor stopped with {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_comes_to_a_conclusion() {
        let result = probe_kvm();
        eprintln!("{result}");
        if std::path::Path::new("/dev/kvm").exists() {
            // Whatever the host, a verdict with a figure or a reason.
            match result {
                KvmProbe::Native(ns) => assert!(ns < NATIVE_NS),
                KvmProbe::Emulated(ns) => assert!(ns >= NATIVE_NS),
                KvmProbe::Unusable(reason) => assert!(!reason.is_empty()),
            }
        } else {
            assert!(matches!(result, KvmProbe::Unusable(_)));
        }
    }
}
