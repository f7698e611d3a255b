"""Makes the modules of this project, and them alone, see Python as it is on Windows. Put this folder on PYTHONPATH.

What POSIX has and Windows lacks cannot be imported and is no attribute there, `os.name` is "nt", and processes are
spawned. Libraries see the machine as it is: their own code for Windows cannot run here, and is not what is tested.
With PYTHONWARNDEFAULTENCODING=1, a file that one of these modules opens without an encoding is an error.
"""

import builtins
import multiprocessing
import os
import signal
import sys
import types
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NO_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
# The documentation of `signal` names these for Windows, and no others.
SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
SIGNAL_FUNCTIONS = {"default_int_handler", "getsignal", "raise_signal", "set_wakeup_fd", "signal", "strsignal",
                    "valid_signals", "Signals", "Handlers", "NSIG"}  # fmt: skip
# "Availability: Unix" in the documentation of `os`.
NOT_IN_OS = """
chown chroot confstr confstr_names ctermid fchdir fchmod fchown fdatasync fork forkpty fpathconf fstatvfs getegid geteuid
getgid getgrouplist getgroups getloadavg getpgid getpgrp getpriority getresgid getresuid getsid getuid getxattr
initgroups killpg lchown listxattr lockf mkfifo mknod nice openpty pathconf pipe2 posix_fadvise posix_fallocate
posix_spawn posix_spawnp pread preadv pwrite pwritev readv register_at_fork removexattr sched_getaffinity
sched_getscheduler sched_setaffinity sched_yield sendfile setegid seteuid setgid setgroups setpgid setpriority setsid
setuid setxattr statvfs sync sysconf sysconf_names tcgetpgrp tcsetpgrp ttyname uname wait wait3 wait4 waitid writev
O_CLOEXEC O_DIRECTORY O_DSYNC O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE EX_OK WEXITSTATUS
WIFEXITED WIFSIGNALED WNOHANG WTERMSIG
"""


def without(module: types.ModuleType, names: set[str]) -> types.ModuleType:
    """A module like the given one that lacks `names`."""
    made = types.ModuleType(module.__name__, module.__doc__)
    vars(made).update({name: value for name, value in vars(module).items() if name not in names})
    return made


known = {name for name in vars(signal) if not name.startswith("_")}
ON_WINDOWS = {
    "os": without(os, set(NOT_IN_OS.split())),
    "signal": without(signal, known - SIGNALS - SIGNAL_FUNCTIONS),
}
ON_WINDOWS["os"].name = "nt"
real_import = builtins.__import__


def import_as_on_windows(name, globals=None, locals=None, fromlist=(), level=0):
    file = (globals or {}).get("__file__") or ""
    if level == 0 and is_ours(file):
        if name.partition(".")[0] in NO_MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in ON_WINDOWS:
            return ON_WINDOWS[name]
    return real_import(name, globals, locals, fromlist, level)


def is_ours(file: str) -> bool:
    path = os.path.abspath(file)
    return path.startswith(f"{ROOT}{os.sep}") and f"{os.sep}.venv{os.sep}" not in path


builtins.__import__ = import_as_on_windows
multiprocessing.set_start_method("spawn")
if sys.flags.warn_default_encoding:
    warnings.filterwarnings("error", category=EncodingWarning, module=r"(util|train_data|__main__|test_on)\b.*")
