"""A stand-in for a server of vLLM, which remembers what it is told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from safetensors.torch import load

from megavlm.vllm.reservation import Reservation
from megavlm.vllm.wire import RUN, unpacked


class StandIn:
    """A server that answers a prompt with its seeds as tokens."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights, self.tensors, self.asked, self.version = None, {}, [], "0.25.1"
        self.lora, self.base, self.adapter, self.updates = None, None, {}, []
        self.status, self.reservation = 200, Reservation()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if run := self.headers.get(RUN):
                    stand_in.reservation.ask(run)
                self.reply(stand_in.identity())

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.reply(getattr(stand_in, self.path.strip("/").replace("/", "_"))(body))

            def reply(self, told: dict | None):
                self.send_response(stand_in.status if told is not None else 503)
                self.end_headers()
                self.wfile.write(json.dumps(told).encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def identity(self):
        return {
            "versions": {"vllm": self.version, "transformers": "5.17.0"},
            "config": self.config,
            "max_model_len": 64,
            "logprobs_mode": "raw_logprobs",
            "weights": self.weights,
            "lora": self.lora,
            **self.reservation.told(),
        }

    def release(self, _):
        self.reservation.release(self.reservation.told()["run"])
        return {}

    def generate(self, body):
        if self.weights is None:
            return None
        head, pixels = unpacked(body)
        self.asked.append((head, bytes(pixels)))
        return {
            "answers": [{"tokens": [seed], "logprobs": [-1.0], "finish": "stop"} for seed in head["seeds"]],
            "weights": self.weights,
        }

    def weights_start(self, body):
        told = json.loads(body)
        if not told["weights"] and told["base"] != self.base:
            return None
        self.weights, self.adapter = None, {}
        self.updates.append([])
        if told["weights"]:
            self.tensors, self.base = {}, None
        return {}

    def weights_bucket(self, body):
        self.updates[-1].append("weights")
        self.tensors |= load(body)
        return {}

    def weights_adapter(self, body):
        self.updates[-1].append("adapter")
        config, tensors = unpacked(body)
        self.adapter = {"config": config, **load(bytes(tensors))}
        return {}

    def weights_finish(self, body):
        told = json.loads(body)
        self.weights, self.base = told["version"], told["base"]
        return {}
