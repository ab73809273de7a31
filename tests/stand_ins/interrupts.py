"""Children that hear Ctrl-C whatever started the test suite."""

import signal


def hear_interrupts() -> None:
    """For ``preexec_fn``: background jobs of a non-interactive shell inherit SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
