"""The system calls a Python program needs that only computes and uses files: all others do not exist for it.

Not among them, for one: sockets, fork, mount, chmod, utime, ptrace, io_uring, memfd, shared memory, keys,
namespaces, prctl, setrlimit. `clone`, `kill` and `prlimit64` are allowed for some arguments (`seccomp`).
"""

from __future__ import annotations

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Numbers on x86_64 and on aarch64, where calls that have a newer form are missing.
_BOTH: dict[str, tuple[int, int]] = {
    # files, of which Landlock says which
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "openat": (257, 56),
    "close": (3, 57),
    "close_range": (436, 436),
    "lseek": (8, 62),
    "dup": (32, 23),
    "dup3": (292, 24),
    "fcntl": (72, 25),
    "flock": (73, 32),
    "ioctl": (16, 29),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "mkdirat": (258, 34),
    "unlinkat": (263, 35),
    "renameat2": (316, 276),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "umask": (95, 166),
    # memory, threads, waiting
    "brk": (12, 214),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "msync": (26, 227),
    "mincore": (27, 232),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    "futex": (202, 98),
    "rseq": (334, 293),
    "set_tid_address": (218, 96),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126),
    "pipe2": (293, 59),
    "eventfd2": (290, 19),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "ppoll": (271, 73),
    "pselect6": (270, 72),
    "restart_syscall": (219, 128),
    # signals of its own, time, chance
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "times": (100, 153),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "getrandom": (318, 278),
    # who and where it is
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getpriority": (140, 141),
    "getrusage": (98, 165),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    # beginning and end
    "execve": (59, 221),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
_X86_64 = {
    "open": 2,
    "stat": 4,
    "lstat": 6,
    "poll": 7,
    "access": 21,
    "pipe": 22,
    "select": 23,
    "dup2": 33,
    "pause": 34,
    "alarm": 37,
    "getdents": 78,
    "rename": 82,
    "mkdir": 83,
    "rmdir": 84,
    "creat": 85,
    "link": 86,
    "unlink": 87,
    "symlink": 88,
    "readlink": 89,
    "getrlimit": 97,
    "getpgrp": 111,
    "arch_prctl": 158,
    "time": 201,
    "epoll_create": 213,
    "epoll_wait": 232,
    "eventfd": 284,
}
_CHECKED = {"clone": (56, 220), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}


def allowed(machine: str) -> dict[str, int]:
    """Numbers of the calls that are allowed with any arguments."""
    column = list(AUDIT_ARCH).index(machine)
    numbers = {name: both[column] for name, both in _BOTH.items()}
    return {**numbers, **_X86_64} if machine == "x86_64" else numbers


def checked(machine: str) -> dict[str, int]:
    """Numbers of the calls whose arguments decide."""
    column = list(AUDIT_ARCH).index(machine)
    return {name: both[column] for name, both in _CHECKED.items()}
