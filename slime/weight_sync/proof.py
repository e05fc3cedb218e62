"""The proof that an engine computes with the trainer's weights: digests compared before a request is served."""

from collections.abc import Sequence

from slime.weight_sync.base import WeightEngine, WeightSyncError

_NAMED = 5  # tensors spelled out in an error; the rest are counted


def verify(engine: WeightEngine, expected: dict[str, str], version: str) -> None:
    """Compare an engine's version and digests with the trainer's.

    The digests are taken anew from the memory that computes, so an engine that only reports
    the new version, lost a bucket, or holds a flipped bit is caught here.

    Raises:
        WeightSyncError: the engine differs; names the engine and the first tensors that do.
    """
    reported = engine.weight_version()
    if reported != version:
        raise WeightSyncError(
            f"{engine.name} ({engine.url}) reports weight version {reported!r} after version {version!r} was sent."
        )
    actual = engine.checksums()
    if problems := differences(expected, actual):
        shown = "; ".join(problems[:_NAMED])
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise WeightSyncError(
            f"{engine.name} ({engine.url}) does not hold version {version} of the weights: {shown}{more}. "
            f"{len(problems)} of {len(expected)} tensors differ, so it stays paused and no sample is generated. "
            "Start the run again from its last checkpoint; if it happens again, try --update-weight-transport disk "
            "and look for failing memory on the engine's host."
        )


def differences(expected: dict[str, str], actual: dict[str, str]) -> Sequence[str]:
    """One phrase for each tensor that is missing, unexpected, or different, in the expected order."""
    problems = []
    for name, digest in expected.items():
        if name not in actual:
            problems.append(f"{name} is missing in the engine")
        elif actual[name] != digest:
            problems.append(f"{name} has digest {actual[name]}, the trainer's is {digest}")
    problems += [f"{name} is in the engine but was never sent" for name in actual if name not in expected]
    return problems
