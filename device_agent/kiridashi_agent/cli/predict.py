"""``kiridashi-agent predict``: one look at what a line's active model says of a frame."""

from __future__ import annotations

import argparse
from pathlib import Path

from kiridashi.command import Command, Outcome
from kiridashi.errors import InputError

from kiridashi_agent.cli.place import add_line_argument, add_state_argument


def _configure(parser: argparse.ArgumentParser) -> None:
    add_line_argument(parser)
    parser.add_argument("image", type=Path, help="an .npy file: uint8 RGB [H, W, 3], or a batch [N, H, W, 3]")
    parser.add_argument("--threads", type=int, help="threads inside one prediction (default: as measured)")
    add_state_argument(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    # Here and not above: the resident agent shares this program and must not load them.
    import numpy as np
    from kiridashi.line import LineModel

    try:
        frame = np.load(arguments.image, allow_pickle=False)
    except OSError as error:
        raise InputError(f"the image {arguments.image} cannot be read", why=str(error)) from error
    except (ValueError, EOFError) as error:
        raise _no_frame(arguments.image) from error
    if not isinstance(frame, np.ndarray):  # several arrays in one file
        raise _no_frame(arguments.image)
    with LineModel.open(arguments.line, arguments.state, arguments.threads) as model:
        prediction = model.predict(frame)
    rows = [
        {"label": prediction.labels[index], "probability": float(values[index])}
        for index, values in zip(prediction.indices, np.atleast_2d(prediction.values), strict=True)
    ]
    data = {"line": arguments.line, "model_digest": prediction.model_digest, "predictions": rows}
    return Outcome(data, "\n".join(f"{row['label']}  {row['probability']:.3f}" for row in rows))


def _no_frame(path: Path) -> InputError:
    step = "write it with numpy.save: uint8 RGB [H, W, 3], or a batch [N, H, W, 3]"
    return InputError(f"the image {path} cannot be read", why="it is not an .npy file of numbers", next_step=step)


COMMANDS = (Command("predict", "predict a frame with a line's active model", _configure, _run),)
