"""The same loop inside a Flower federation (`fedmllm[flower]`, 1.41), for those who run one.

    app.py      writes a Flower app and the folders of server and sites
    server.py   its ServerApp: `sites.serving.serve` over a `Link` on Flower's grid
    client.py   its ClientApp: carries bytes between Flower and the worker, and loads no torch
    worker.py   the resident process at a site: Flower starts a new one for every message, and the
                base model would be loaded anew each round

Only server.py and client.py import Flower.
"""
