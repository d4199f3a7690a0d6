"""Serving on Ray Serve: app.py starts deployment.py's two deployments, the HTTP ingress (http/) and model replicas
(engine/).

chat.py runs the same engine on a terminal, without Ray. engine/ imports neither http/ nor this folder.
"""
