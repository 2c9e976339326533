"""The speed benchmark on a CPU: it runs, every way trains what it should. Not here: any timing."""

import json


def test_every_way_that_a_cpu_can_run(launch, tmp_path):
    output = tmp_path / "speed.json"
    options = ("--shape", "tiny", "--device", "cpu", "--steps", 2, "--ranks", "[1, 2, 4]")
    done = launch("benchmark/speed", *options, "--rounds", 2, "--output", output, alone=True)
    results = json.loads(output.read_text())["results"]
    kinds = {}
    for result in results:
        kinds.setdefault(result["method"], []).append(result["step"])
        assert 0 < result["q1"] <= result["ms"] <= result["q3"]
    bilevel = ["weights", "architecture", "bilevel"]
    assert kinds == {
        "forward_only": ["forward"],
        "frozen": ["forward and backward"],
        "peft_bf16": ["weights"],
        "peft_float32": ["weights"],
        "peft_autocast": ["weights"],
        **dict.fromkeys(("nested_bf16", "nested", "independent", "pairs"), bilevel),
        **dict.fromkeys(("clones", "clones_apart"), bilevel),
    }
    assert "over PEFT" in done.stdout and done.stdout.count("\nnested weights: ") == 2


def test_growth_on_the_tiny_shape(launch, tmp_path):
    output, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    options = ("--shape", "tiny", "--device", "cpu", "--steps", 2, "--output", output)
    launch("benchmark/speed_growth", *options, "--plot", plot, alone=True)
    points = json.loads(output.read_text())["points"]
    values = {}
    for point in points:
        assert point["ms"] > 0
        values.setdefault((point["axis"], point["branches"]), []).append(point["value"])
    for branches in ("nested", "independent"):
        assert values["candidates", branches] == [2, 3, 4, 5, 6, 7, 8]
        assert values["rank", branches] == [16, 32] and values["layers", branches] == [7, 14]
    assert plot.read_bytes().startswith(b"\x89PNG")
