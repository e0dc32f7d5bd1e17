"""What the entry point `verl.plugins` imports: it registers the loss and the estimators.

verl keeps an error here to itself (it logs it at level DEBUG), so it is told before it is raised. Without the entry
point: VERL_USE_EXTERNAL_MODULES=atpo_kernels.hosts.verl.plugin.
"""

from __future__ import annotations

import logging

from atpo_kernels.hosts.verl import register

try:
    register()
except Exception as error:
    logging.getLogger(__name__).error("atpo_kernels is not registered with verl: %s: %s", type(error).__name__, error)
    raise
