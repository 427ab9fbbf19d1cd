"""The application of each HTTP process of a server that has several (`--tokenizer-worker-num`), imported by its name.

SGLang calls no plugin in these processes, so importing this does.
"""

import os
import pkgutil

from sglang.srt.plugins import load_plugins

from updraft_sglang.plugin import APP, new_http_process

load_plugins()
app = pkgutil.resolve_name(os.environ[APP])
new_http_process().add_door(app)
