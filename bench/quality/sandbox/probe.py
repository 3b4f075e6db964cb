"""A program that runs against every wall, and ends early if it gets through one."""

PROBE = """
import os, resource, signal, socket, threading

thread = threading.Thread(target=int)  # threads are allowed
thread.start()
thread.join()
with open("own", "w") as file:  # so are files of its own
    file.write("x")

def own_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    assert soft != resource.RLIM_INFINITY, "CPU time is not limited"
    resource.setrlimit(resource.RLIMIT_CPU, (soft + 1, hard + 1))

ATTEMPTS = {
    "read a file": lambda: open("/etc/passwd"),
    "list a folder": lambda: os.listdir("/"),
    "write a file": lambda: open("../tandem-candidate-escaped", "w"),
    "move a file out": lambda: os.rename("own", "../tandem-candidate-escaped"),
    "remove a folder": lambda: os.rmdir("/tmp"),
    "change a mode": lambda: os.chmod("/tmp", 0o1777),
    "open a socket": lambda: socket.socket(),
    "open a local socket": lambda: socket.socket(socket.AF_UNIX),
    "start a process": lambda: os.fork() or os._exit(0),
    "run a program": lambda: os.execv("/bin/true", ["true"]),
    "signal another process": lambda: os.kill(os.getppid(), 0),
    "signal all processes": lambda: os.kill(-1, 0),
    "raise a limit": own_limit,
    "take 10 GB": lambda: bytearray(10 << 30),
    "see the environment": lambda: os.environ["PATH"],
}
for name, attempt in ATTEMPTS.items():
    try:
        attempt()
    except (OSError, ValueError, MemoryError, KeyError):
        continue
    raise SystemExit(f"a program can {name}")
"""
