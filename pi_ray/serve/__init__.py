"""Serving on Ray Serve: app.py starts deployment.py's two deployments, an HTTP ingress (http/) and replicas (engine/).

chat.py runs the same engine on a terminal, without Ray. engine/ imports neither http/ nor this folder.
"""
