"""recipes/benchmark/draw_ranks.py: a picture of a genotype.
Not here: how it looks."""

from PIL import Image


def test_it_draws_every_part(launch, search_dir, tmp_path):
    options = ("--genotype", search_dir / "genotype.json", "--output", tmp_path / "ranks.png")
    launch("benchmark/draw_ranks", *options, alone=True)
    picture = Image.open(tmp_path / "ranks.png").convert("RGB")
    assert picture.width > 1000
    colours = {colour for _, colour in picture.getcolors(2**24)}
    assert len([c for c in colours if c[2] > c[0] + 40]) >= 2, "ranks 2 and 4 in shades of blue"
