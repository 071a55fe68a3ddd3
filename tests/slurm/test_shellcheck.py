import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_has_nothing_to_say(script):
    if (program := shutil.which("shellcheck")) is None:
        reason = "shellcheck is not installed"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    result = subprocess.run([program, "-x", str(script)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    result = subprocess.run([program, "slurm/common.sh"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
