"""The application of each of several HTTP processes (`--tokenizer-worker-num`), imported by its name.

SGLang loads no plugins in these processes, so this module does when it is imported.
"""

import os
import pkgutil

from sglang.srt.plugins import load_plugins

from updraft_sglang.plugin import APP, http_process

load_plugins()
app = pkgutil.resolve_name(os.environ[APP])
http_process().add_door(app)
