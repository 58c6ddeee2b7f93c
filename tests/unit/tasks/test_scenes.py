"""Rendering: seeded, varied, and with the object in view."""

import numpy as np
import pytest
from kiridashi_server.tasks.scenes import background, render
from kiridashi_server.tasks.seeding import generator_for
from PIL import Image

RED = Image.new("RGBA", (48, 48), (255, 0, 0, 255))
NOTHING = Image.new("RGBA", (48, 48), (0, 0, 0, 0))


@pytest.mark.parametrize("size", [32, 64, 224])
def test_a_view_depends_on_its_key_alone(size: int) -> None:
    first = render(RED, size, generator_for(0, "view", 1))
    assert first.shape == (size, size, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, render(RED, size, generator_for(0, "view", 1)))
    assert not np.array_equal(first, render(RED, size, generator_for(0, "view", 2)))
    assert not np.array_equal(first, render(RED, size, generator_for(1, "view", 1)))


def test_keys_are_not_run_together() -> None:
    assert generator_for("a", "bc").random() != generator_for("ab", "c").random()


def test_the_object_fills_a_good_part_of_the_frame() -> None:
    """A red square of 62 to 92 % of the side: its share of red pixels lies between the two squares."""
    for view in range(40):
        image = render(RED, 64, generator_for("red", view)).astype(int)
        share = np.mean(image[:, :, 0] > 1.6 * image[:, :, 1:].max(axis=2))
        assert 0.30 < share < 0.90


def test_an_empty_drawing_shows_the_background_only() -> None:
    image = render(NOTHING, 64, generator_for("empty")).astype(float)
    assert image.mean(axis=(0, 1)).std() < 60


def test_backgrounds_differ_and_stay_mostly_in_range() -> None:
    scenes = np.stack([background(64, generator_for("scene", view)) for view in range(60)])
    assert scenes.dtype == np.float32
    assert scenes.mean(axis=(1, 2, 3)).std() > 20
    assert np.median(scenes.std(axis=(1, 2)).mean(axis=1)) > 3
    assert np.mean((scenes < 0) | (scenes > 255)) < 0.02
