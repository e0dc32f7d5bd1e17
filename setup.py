"""Which packages are installed from where: `atpo_fast` from the root, `atpo_kernels` from its source root `kernels/`.

Everything else about the project is in pyproject.toml. `pip install ./kernels` installs only `atpo_kernels`.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(".", include=["atpo_fast", "atpo_fast.*"]),
        *find_namespace_packages("kernels", include=["atpo_kernels", "atpo_kernels.*"]),
    ],
    package_dir={"": ".", "atpo_kernels": "kernels/atpo_kernels"},
    package_data={"": ["*.html", "*.css", "*.js", "py.typed"]},
)
