"""Prompt compression, x~ = C(x, rate) (paper equation 2): a file for each compressor; rate control; protection.

A template and a rate enter `template.compress_template`, a `CompressedTemplate` with its measured rate leaves. Imports
hosted/, run/ and what lies below.
"""
