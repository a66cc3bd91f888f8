"""The README's code runs and says what it prints."""

import pathlib
import re

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs_and_its_numbers_are_right():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)
    stated = re.search(r"payload_bytes\(h\)\s+# (\d+), .* h has (\d+)", code)
    assert names["codec"].payload_bytes(names["h"]) == int(stated[1])
    assert names["h"].nbytes == int(stated[2])


def test_the_codec_table_names_every_codec_and_its_defaults():
    from msjax import compress

    rows = re.findall(r"^\| `(\w+\(.*?\))` \|", README, re.MULTILINE)
    found = {compress.from_string(row) for row in rows}
    assert found == {cls() for cls in compress.CODECS}
