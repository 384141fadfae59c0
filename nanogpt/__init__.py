"""NanoGPT: train a GPT on your own text, on the machine you have.

Nothing is imported here, so that `nanogpt <command> --help` stays instant. The pieces:

    from nanogpt.config import TrainConfig
    from nanogpt.train import fit
    from nanogpt.model import GPT, GPTConfig
"""

import sys

__version__ = "0.1.0"

if sys.version_info < (3, 10):  # noqa: UP036 - who has an older one shall read that, not a traceback
    sys.stderr.write("error: NanoGPT needs Python 3.10 or newer, and this is %d.%d\n" % sys.version_info[:2])  # noqa: UP031
    raise SystemExit(2)
