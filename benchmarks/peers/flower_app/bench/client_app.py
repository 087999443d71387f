"""A site: adds its number to every value and sends the full model back."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    constant = np.float32(context.node_config["number"])
    values = {name: array.numpy() + constant for name, array in message.content["arrays"].items()}
    arrays = ArrayRecord({name: Array(value) for name, value in values.items()})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
