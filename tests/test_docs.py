"""Every command in the README and the docs names a script, config files and options that exist, with fitting values."""
import os
import re
import shlex

import pytest

from configurator import convert, read_options

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = ["README.md", *(f"docs/{name}" for name in sorted(os.listdir(f"{ROOT}/docs")) if name.endswith(".md"))]


def commands(page):
    """Lines of code blocks and `code` that start one of our scripts, without what follows a comment sign."""
    with open(os.path.join(ROOT, page), encoding="utf-8") as f:
        text = f.read()
    blocks = re.findall(r"^(?:    |\$ )(.+)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)
    blocks += [line for block in re.findall(r"```\w*\n(.*?)```", text, re.S) for line in block.splitlines()]
    found = [re.split(r"\s{3,}|\s#", line.strip())[0] for line in blocks]
    return [line for line in found if re.match(r"(python|torchrun|bash) .*\w+\.(py|sh)\b", line)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_configs_and_options_that_exist(page):
    for line in commands(page):
        words = shlex.split(line)
        script = next(word for word in words if word.endswith((".py", ".sh")))
        assert os.path.exists(os.path.join(ROOT, script)), line
        if script.endswith(".sh") or "/" in script:
            continue
        options = read_options(os.path.join(ROOT, script))
        for word in words[words.index(script) + 1:]:
            if word.startswith("--") and word != "--help":
                name, _, value = word[2:].partition("=")
                assert name in options, line
                convert(name, value, options[name][0])
            elif word.endswith(".py"):
                assert os.path.exists(os.path.join(ROOT, word)), line


def test_the_readme_has_commands_to_check():
    assert any("runs/demo.sh" in line for line in commands("README.md"))
    assert any("pretrain.py" in line for line in commands("README.md"))


STAGES = ("sft", "reward", "dpo", "ppo", "grpo")       # that begin a config's name; pretrain.py's begin with none


@pytest.mark.parametrize("name", sorted(os.listdir(os.path.join(ROOT, "config"))))
def test_every_config_sets_options_of_its_stage_only(name):
    from configurator import run_config
    stage = name.split("_")[0]
    options = read_options(os.path.join(ROOT, f"{stage if stage in STAGES else 'pretrain'}.py"))
    values = {key: default for key, (default, _, _) in options.items()}
    run_config(os.path.join(ROOT, "config", name), values, options)


def test_every_file_of_the_readme_exists_and_every_file_is_in_the_readme():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        listed = set(re.findall(r"^\| `([\w./]+\.py)` \|", f.read(), re.M))
    assert listed == {name for name in os.listdir(ROOT) if name.endswith(".py")}


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_is_left_open(page):
    with open(os.path.join(ROOT, page), encoding="utf-8") as f:
        assert not re.search(r"@[A-Z_]+@|PLACEHOLDER|TODO", f.read())
