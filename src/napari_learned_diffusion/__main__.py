"""Where the console script and ``python -m napari_learned_diffusion`` begin.

Nothing is imported here that takes time, so that Ctrl-C ends the program quietly from the first
moment on, in the midst of an import, too.
"""

import signal
import sys
from types import FrameType

_INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Run the command line."""
    interrupted = False

    def interrupt(_: int, __: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        from napari_learned_diffusion.cli import main as run

        run()
    except SystemExit:
        raise
    except BaseException:
        # Libraries that are being imported may have made another error of it.
        if interrupted:
            sys.exit(_INTERRUPTED)
        raise


if __name__ == "__main__":
    main()
