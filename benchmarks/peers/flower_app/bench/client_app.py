"""A site: adds one to every value and sends the full model back."""

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:  # noqa: ARG001 - the signature is Flower's
    values = {name: array.numpy() + 1 for name, array in message.content["arrays"].items()}
    arrays = ArrayRecord({name: Array(value) for name, value in values.items()})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
