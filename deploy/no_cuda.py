"""`no_cuda.py [pip options] requirement…` exits with 1, and says what to do, if pip would fetch CUDA packages. For use without a GPU."""

import json
import subprocess
import sys


def main() -> int:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", *sys.argv[1:]]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode != 0:
        return found.returncode
    packages = [item["metadata"] for item in json.loads(found.stdout)["install"]]
    cuda = sorted(f"{package['name']} {package['version']}" for package in packages if is_cuda(package["name"]))
    if not cuda:
        return 0
    print(
        f"No GPU is here, but pip would install {len(cuda)} CUDA packages ({', '.join(cuda[:3])}, …), several GB.\n"
        "Name the index of PyTorch's CPU builds, as its installation page gives it for 'CPU':\n"
        "    make TORCH_INDEX=<index of the CPU builds> …\n"
        "or say that you want this: make TORCH=torch HAS_GPU=1 …",
        file=sys.stderr,
    )
    return 1


def is_cuda(name: str) -> bool:
    return name.lower().startswith(("nvidia-", "cuda-"))


if __name__ == "__main__":
    sys.exit(main())
