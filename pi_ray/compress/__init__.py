"""Prompt compression, x~ = C(x, rate) (paper equation 2): one file for each compressor, rate control, protection of
spans.

A template and a rate enter `template.compress_template`; a `CompressedTemplate` with its measured rate leaves. Imports
tasks/ and below.
"""
