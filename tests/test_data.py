"""data.py: the script that prepares text, chats and pairs."""
import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def test_the_script_prepares_text_and_names_the_next_command(tmp_path):
    stories = tmp_path / "stories.jsonl"
    stories.write_text("".join(json.dumps({"text": f"Story {i}: the fox found {i * i} berries."}) + "\n"
                               for i in range(200)))
    run = lambda *flags: subprocess.run([sys.executable, HERE / "data.py", f"--out_dir={tmp_path}/out", *flags],
                                        cwd=tmp_path, capture_output=True, text=True)
    done = run(f"--sources={stories}", "--vocab_size=300")
    assert done.returncode == 0 and done.stderr == ""
    assert re.search(r"train: 1\d\d documents, .* tokens, .* bytes per token\n", done.stdout)
    assert done.stdout.endswith(f"next: python pretrain.py --data={tmp_path}/out\n")
    wrong = run("--kind=chat")
    assert wrong.returncode == 1 and wrong.stderr == "data.py: kind is 'chat'; it must be text, chats or pairs\n"


def test_importing_data_takes_numpy_only():
    code = "import data, sys; print([m for m in ('torch', 'h5py', 'pyarrow', 'datasets', 'tqdm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "[]\n"
