"""PatternKV low-bit KV cache for SGLang: ``--kv-quant patternkv``.

The package is a plug-in: SGLang discovers it through entry points (``plugin.load`` and
``platform.activate``). Importing it by hand is only needed for the version.
"""

__version__ = "0.1.0"
