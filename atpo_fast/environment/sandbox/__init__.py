"""Run a piece of Python code under limits: the program that the python tool starts for each call (`main.py`).

Only the standard library is imported, and nothing of the package outside of this folder, so that it starts fast: the
tool puts the folder above on the path of a bare interpreter and imports it there as `sandbox`. Three processes:

1. the starter cuts itself off (user, mount, network, IPC and process namespaces, where the kernel allows them), unless
   bubblewrap has started it there (`bubblewrap.py`);
2. the keeper, the first process of its namespace, builds a root of its own in which little can be read and nothing be
   written, waits for the code, counts the memory of all its processes, and takes every process that the code left
   behind with it when it ends;
3. the code's own process, without privileges, under resource limits and a system-call filter.

Where bubblewrap or nobody has created namespaces, the first two are one. Without any it adopts orphans and kills them,
and Landlock, where the kernel has it, bounds files and signals. The tool is told what was obtained, and logs it.

This guards against accidents, careless code of a policy and code that looks for the answers. It is no guarantee against
an attack on the kernel.
"""
