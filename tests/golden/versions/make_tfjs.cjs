// node make_tfjs.cjs FOLDER NODE_MODULES, which holds one version of @tensorflow/tfjs-core and @tensorflow/tfjs-layers.

const fs = require("fs");
const path = require("path");
const { createRequire } = require("module");

const load = createRequire(path.resolve(process.argv[3]) + "/");
const tf = load("@tensorflow/tfjs-core");
if (fs.existsSync(path.join(process.argv[3], "@tensorflow/tfjs-backend-cpu"))) load("@tensorflow/tfjs-backend-cpu");
const layers = load("@tensorflow/tfjs-layers");
const L = layers.layers;

// Park and Miller's generator: the same numbers in every version.
let state = 1;
const uniform = (low, high) => {
  state = (state * 16807) % 2147483647;
  return low + (high - low) * (state / 2147483647);
};
const random = (shape, low, high) =>
  tf.tensor(Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => uniform(low, high)), shape, "float32");

const image = () =>
  layers.sequential({
    name: "image",
    layers: [
      L.conv2d({ filters: 3, kernelSize: [3, 2], inputShape: [4, 5, 2], name: "conv" }),
      L.batchNormalization({ name: "norm" }),
      L.activation({ activation: "relu", name: "relu" }),
      L.conv2dTranspose({ filters: 4, kernelSize: [2, 3], strides: 2, name: "up" }),
      L.flatten({ name: "flatten" }),
      L.dense({ units: 5, name: "dense" }),
    ],
  });

const lstm = () => {
  const x = layers.input({ shape: [5], name: "x" });
  let y = L.embedding({ inputDim: 7, outputDim: 4, name: "embedding" }).apply(x);
  y = L.lstm({ units: 5, returnSequences: true, recurrentActivation: "sigmoid", name: "lstm" }).apply(y);
  y = L.layerNormalization({ name: "norm" }).apply(y);
  return layers.model({ inputs: x, outputs: L.dense({ units: 2, name: "dense" }).apply(y), name: "lstm_model" });
};

const main = async () => {
  const version = layers.version_layers;
  const folder = path.join(process.argv[2], `tfjs-${version}`);
  const recorded = {};
  for (const [name, make] of Object.entries({ image, lstm })) {
    state = 1;
    const model = make();
    for (const layer of model.layers)
      layer.setWeights(
        layer.getWeights().map((w, i) => (layer.name === "norm" && i === 3 ? random(w.shape, 0.5, 1.5) : random(w.shape, -0.5, 0.5))),
      );
    const x = name === "image" ? random([2, 4, 5, 2], -1, 1) : tf.tensor([[3, 1, 4, 1, 5], [6, 2, 0, 5, 3]]);
    const y = model.predict(x);
    recorded[name] = { x: x.arraySync(), y: y.arraySync() };
    const at = path.join(folder, name);
    fs.mkdirSync(at, { recursive: true });
    await model.save(
      tf.io.withSaveHandler(async (made) => {
        const manifest = [{ paths: ["./model.weights.bin"], weights: made.weightSpecs }];
        const { modelTopology, format, generatedBy, convertedBy } = made;
        fs.writeFileSync(
          path.join(at, "model.json"),
          JSON.stringify({ modelTopology, format, generatedBy, convertedBy, weightsManifest: manifest }),
        );
        fs.writeFileSync(path.join(at, "model.weights.bin"), Buffer.from(made.weightData));
        return { modelArtifactsInfo: { dateSaved: new Date(), modelTopologyType: "JSON" } };
      }),
    );
  }
  fs.writeFileSync(path.join(folder, "outputs.json"), JSON.stringify(recorded));
};

main();
