"""Where classes of diffusers and transformers come from."""

import subprocess
import sys

from tests.support import ROOT

LOOKS = """
import sys
from synthos.models.meta import find_class
names = [find_class(name).__name__ for name in ("AutoencoderKLWan", "UMT5EncoderModel")]
seen = [name for name in ("boto3", "scipy") if name in sys.modules]
import boto3, scipy.stats
print(names, seen)
"""


def test_what_only_takes_time_to_import_is_not_imported_and_can_be_later() -> None:
    done = subprocess.run([sys.executable, "-c", LOOKS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['AutoencoderKLWan', 'UMT5EncoderModel'] []", done.stderr
