"""Corpora on disk: from the files a user has to Megatron's ``.bin`` / ``.idx`` pairs.

One file for each stage, in the order the data passes them:

- ``sources``: which files a corpus consists of, and how they are cut into blocks;
- ``encoders``: bytes to token ids;
- ``blocks``: a block to tokens, in this process or in several;
- ``indexed``: tokens to the pair on disk, and the pair's checks.

Nothing here imports torch or megatron, so a worker process starts in a fraction of a second.
"""


class CorpusError(Exception):
    """A request that cannot be met, in one sentence for the user (exit code 2)."""
