"""The ClientApp: a new process for every message, which hands it to the resident worker."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedmllm.sites.flower.courier import ask_worker

app = ClientApp()


@app.train()
def carry(message: Message, context: Context) -> Message:
    """Any task: what it is stands in the record ``task``, a message of ours in ``blob``."""
    arrays = message.content.array_records.get("blob")
    blob = arrays["message"].data if arrays else b""
    kit = Path(str(context.node_config["kit"]))
    reply, answer = ask_worker(kit, dict(message.content.config_records["task"]), blob)
    content = RecordDict({"reply": ConfigRecord(reply)})
    if answer:
        array = Array("uint8", (len(answer),), "safetensors", answer)
        content["blob"] = ArrayRecord({"message": array})
    return Message(content, reply_to=message)
