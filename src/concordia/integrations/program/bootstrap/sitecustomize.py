"""First thing that a protected Python program runs, where a policy names call stacks.

Owns: the arrangement with native/stack.c by which the shim sees Python frames: faulthandler writes
the traceback of a thread that gets a signal, and needs no interpreter lock for it. Promises: needs
the standard library alone, changes nothing that a program sees but one real-time signal, and runs
the program's own sitecustomize afterwards. Called by the interpreter, through PYTHONPATH.
"""


def _arrange() -> None:
    import faulthandler
    import os
    import signal

    path = os.environ.get("CONCORDIA_STACK_PATH")
    for name in ("CONCORDIA_STACK_SIGNAL", "CONCORDIA_STACK_FILE"):
        os.environ.pop(name, None)  # of a parent: its descriptors are not ours
    number = int(signal.SIGRTMIN) + 11
    if not path or signal.getsignal(number) != signal.SIG_DFL:
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # of a run that is over
    faulthandler.register(number, file=descriptor, all_threads=False)
    os.environ["CONCORDIA_STACK_SIGNAL"] = str(number)
    os.environ["CONCORDIA_STACK_FILE"] = str(descriptor)


def _chain() -> None:
    """The sitecustomize that would have been found without ours."""
    import importlib.machinery
    import importlib.util
    import os
    import sys

    here = os.path.dirname(os.path.abspath(__file__))
    paths = [path for path in sys.path if os.path.abspath(path or ".") != here]
    found = importlib.machinery.PathFinder.find_spec("sitecustomize", paths)
    if found is None or found.loader is None:
        return
    module = importlib.util.module_from_spec(found)
    sys.modules["sitecustomize"] = module
    found.loader.exec_module(module)


_arrange()
_chain()
