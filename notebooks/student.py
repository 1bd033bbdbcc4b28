"""`python notebooks/student.py FOLDER` copies the course there for students, without its solutions."""

import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent

def without_solutions(notebook):
    """A notebook (bytes of JSON) without its solutions and outputs, as a text."""
    content = json.loads(notebook)
    for cell in content["cells"]:
        source = "".join(cell["source"])
        source = re.sub(r"(?s)<details><summary>Solution</summary>.*?</details>\s*", "", source)
        source = re.sub(r"(?s)^# A solution.*?def (\w+)\(.*", r"assert answer\n\1 = answer", source)
        cell["source"] = source.splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None, metadata={})
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: python notebooks/student.py FOLDER, a folder that is not there yet")
    folder = Path(sys.argv[1])
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("runs", "__pycache__", "student.py"))
    for name in ("slimflow.py", "convert.py", "toy2d.py", "digits.npz"):
        shutil.copy(HERE.parent / name, folder)
    for path in folder.glob("*.ipynb"):
        path.write_text(without_solutions(path.read_bytes()), encoding="utf-8")
