"""`clipindex bench` as a committed result: every stage, and all together, beside what bounds each."""

from reporting import Row, arguments, finish

from clipindex.bench.run import bench

MODELS = ("ViT-B-32", "RN50")


def main() -> None:
    """Measure, print and, with --save, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--precisions", nargs="+", default=["auto", "fp32"])
    parser.add_argument("--images", type=int)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    report = bench(options.models, precisions=options.precisions, images=options.images, device=options.device)
    rows: list[Row] = [
        {
            "stage": row.stage,
            "setting": row.setting,
            "images_per_s": round(row.images_per_s, 1),
            "ceiling_per_s": round(row.ceiling_per_s, 1),
            "ratio": round(row.of_ceiling, 2),
            "ceiling is": row.ceiling,
        }
        for row in report.measurements
    ]
    finish("bench", rows, options.save)


if __name__ == "__main__":
    main()
