"""`megarlhf convert` from a checkout: Llama 3 models between Hugging Face directories and megarlhf's.

python tools/convert_hf.py model=Llama-3.1-8B output=checkpoints/llama to=megatron
python tools/convert_hf.py model=runs/ppo output=Llama-3.1-8B-ppo to=hf verify=true
"""

from __future__ import annotations

import sys

from megarlhf.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
