"""Train the judge of the shipped model's samples: a small convolutional classifier of Fashion-MNIST images.

    python -m demo.train_classifier            # writes demo/output/fashion_mnist/classifier.pb; minutes on a laptop

It writes a graph file, which `evaluation/inception.py` runs like the network of FID. It never sees a generated image.
If it is stopped, the same command continues.
"""

from collections import OrderedDict
from pathlib import Path

from runtime import cli


def parse_args(argv=None):
    from demo.train_loop import MODEL_FOLDER, parser

    result = parser(__doc__, name="classifier", updates=4000, batch_size=128)
    result.add_argument("--out", type=Path, default=MODEL_FOLDER / "classifier.pb", help="graph file to write")
    return result.parse_args(argv)


def build_classifier():
    """Images float32 (N, 3, 32, 32) in [-1, 1] -> logits (N, 10).

    The parts are named like the nodes in which the evaluator looks for features: 64 numbers of the whole image, whose
    plain product the classes are, and 7 of the 64 maps of 8x8.
    """
    from torch import nn

    def conv(inputs, outputs):
        norm = nn.BatchNorm2d(outputs, eps=1e-3)
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm, nn.ReLU())

    parts = {
        "conv": conv(3, 32),
        "pool": nn.MaxPool2d(2),
        "conv_1": conv(32, 64),
        "pool_1": nn.MaxPool2d(2),
        "mixed_6_conv": conv(64, 64),
        "conv_2": conv(64, 128),
        "pool_2": nn.MaxPool2d(2),
        "conv_3": conv(128, 64),
        "pool_3": nn.AvgPool2d(4),
        "flatten": nn.Flatten(),
        "dropout": nn.Dropout(0.1),
        "logits": nn.Linear(64, 10, bias=False),
    }
    return nn.Sequential(OrderedDict(parts))


def save_graph(classifier, path):
    """Write the classifier in evaluation mode as a graph file with the evaluator's nodes.

    Its input ExpandDims takes images (N, H, W, 3) from 0 to 255 of any size, which are resized to 32 x 32.
    Raises UserError if the file cannot be written.
    """
    from torch import nn

    from evaluation.graph_file import FLOAT, GraphWriter

    def array(tensor):
        return tensor.detach().cpu().numpy()

    graph = GraphWriter()
    x = graph.node("ExpandDims", "Placeholder", dtype={"type": FLOAT})
    x = graph.resize(x, 32, 127.5, 1 / 127.5)
    for name, part in classifier.named_children():
        if isinstance(part, nn.Sequential):
            name = name.replace("mixed_6_", "mixed_6/")
            conv, norm, _ = part
            kernel = array(conv.weight.permute(2, 3, 1, 0))  # (height, width, C_in, C_out)
            moments = [array(moment) for moment in (norm.bias, norm.weight, norm.running_mean, norm.running_var)]
            x = graph.convolution(name, x, kernel, *moments, epsilon=norm.eps)
        elif isinstance(part, (nn.MaxPool2d, nn.AvgPool2d)):
            op = "MaxPool" if isinstance(part, nn.MaxPool2d) else "AvgPool"
            x = graph.pool(name, op, x, part.kernel_size, part.stride, b"VALID")
    graph.classes(x, array(classifier.logits.weight.T))
    graph.save(path)


def main(args):
    import torch

    from demo.train_loop import load_split, normalise, train
    from evaluation import inception
    from runtime.devices import pick_device

    device = pick_device(args.device)
    images, labels = load_split(args.data, "train")
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    classifier = build_classifier().to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2)

    def loss_of_batch():
        index = torch.randint(len(images), (args.batch_size,), generator=generator)
        x = normalise(images[index]).to(device)
        # The only augmentation: shifts of up to two pixels.
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        return torch.nn.functional.cross_entropy(classifier(x.roll(shift, (2, 3))), labels[index].to(device))

    loss = train(loss_of_batch, optimizer, generator, updates=args.steps, work=args.work, classifier=classifier)
    save_graph(classifier, args.out)
    held_out, classes = load_split(args.data, "test")
    share = inception.Graph(args.out, device).class_accuracy(held_out.permute(0, 2, 3, 1), classes)
    print(f"final loss {loss}, accuracy on the test images {share:.2%}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
