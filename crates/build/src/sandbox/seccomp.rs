//! System calls that root of a container's sandbox is refused: what no build needs, and what the kernel gives root of a user namespace for the
//! asking. Steps have Docker's own filter besides.

use serde_json::{Value, json};

/// Refused as forbidden.
const FORBIDDEN: [&str; 33] = [
    "acct",
    "adjtimex",
    "bpf",
    "clock_adjtime",
    "clock_adjtime64",
    "clock_settime",
    "clock_settime64",
    "delete_module",
    "fanotify_init",
    "finit_module",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "lookup_dcookie",
    "nfsservctl",
    "open_by_handle_at",
    "perf_event_open",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "settimeofday",
    "stime",
    "swapoff",
    "swapon",
    "syslog",
    "userfaultfd",
    "uselib",
    "vhangup",
];

/// Refused as if the kernel did not have them: the runtime of the steps does without a keyring then.
const ABSENT: [&str; 3] = ["add_key", "keyctl", "request_key"];

/// Families of sockets that programs of images use: UNIX, IPv4, IPv6, netlink and packets.
///
/// A filter cannot read the family of a 32-bit program that calls `socketcall(2)`, as glibc does: libseccomp refuses it every family then.
const FAMILIES: [u64; 5] = [1, 2, 10, 16, 17];
/// More than the kernel has.
const MOST_FAMILIES: u64 = 64;
/// The bits of the argument that the kernel reads: it is an `int`. A filter that compares all 64 is passed by setting one of the others.
const FAMILY_BITS: u64 = 0xffff_ffff;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const EAFNOSUPPORT: u32 = 97;

/// The filter, as an OCI runtime reads it.
pub(super) fn filter() -> Value {
    let refuse = |names: &[&str], error: u32| json!({ "names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": error });
    let mut calls = vec![refuse(&FORBIDDEN, EPERM), refuse(&ABSENT, ENOSYS)];
    for family in (0..MOST_FAMILIES).filter(|family| !FAMILIES.contains(family)) {
        let mut call = refuse(&["socket", "socketpair"], EAFNOSUPPORT);
        call["args"] = json!([{ "index": 0, "value": FAMILY_BITS, "valueTwo": family, "op": "SCMP_CMP_MASKED_EQ" }]);
        calls.push(call);
    }
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": calls,
    })
}
