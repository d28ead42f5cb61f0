// TensorFlow.js in Node: one request a line in, one answer a line out; arrays lie in files of raw little-endian numbers.
// The model that was made or loaded last is the one that is filled, saved and run.

import fs from 'node:fs';
import path from 'node:path';
import readline from 'node:readline';
import {createRequire} from 'node:module';

console.log = console.info = console.warn = console.error;

const require = createRequire(import.meta.url);
const tf = require('@tensorflow/tfjs');

const ARRAYS = {float32: Float32Array, int32: Int32Array};
const WRAPPERS = new Set(['bidirectional', 'timeDistributed']);
let model = null;

function read(file, dtype) {
  const bytes = fs.readFileSync(file);
  return new ARRAYS[dtype](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
}

function write(file, numbers) {
  fs.writeFileSync(file, Buffer.from(numbers.buffer, numbers.byteOffset, numbers.byteLength));
}

function sequential(rows, name, inputShape, dtype) {
  const made = tf.sequential({name});
  made.add(tf.layers.inputLayer({inputShape, dtype, name: `${name}_input`}));
  for (const row of rows) {
    made.add(layer(row, made.outputs[0].shape.slice(1)));
  }
  return made;
}

function layer(row, inputShape) {
  if (row.cls === 'sequential') {
    return sequential(row.inside, row.name, inputShape, 'float32');
  }
  const inside = row.inside.map((one) => layer(one, inputShape));
  const config = {...row.args, name: row.name};
  if (WRAPPERS.has(row.cls)) {
    config.layer = inside[0];
  } else if (inside.length > 0) {
    config.cell = inside.length > 1 ? inside : inside[0];
  }
  return tf.layers[row.cls](config);
}

function graph(rows, inputs) {
  const values = Object.fromEntries(inputs.map((one, i) => [`x${i}`, one]));
  const layers = {};
  let value = inputs[0];
  let ends = [];
  for (const row of rows) {
    const given = row.of.length > 0 ? row.of.map((name) => values[name]) : [value];
    ends = ends.filter((end) => !given.includes(end));
    layers[row.name] = layers[row.cls] ?? layer(row, given[0].shape.slice(1));
    value = values[row.name] = layers[row.name].apply(given.length > 1 ? given : given[0]);
    ends.push(value);
  }
  return tf.model({inputs, outputs: ends, name: 'zoo'});
}

function weights() {
  return {weights: model.weights.map((one) => ({name: one.originalName, shape: one.shape}))};
}

const commands = {
  make({builder, rows, inputs}) {
    if (builder === 'sequential') {
      model = sequential(rows, 'zoo', inputs[0].shape, inputs[0].dtype);
    } else {
      model = graph(rows, inputs.map((one, i) => tf.input({...one, name: `x${i}`})));
    }
    return weights();
  },

  set({file}) {
    const numbers = read(file, 'float32');
    let start = 0;
    const tensors = model.weights.map((one) => {
      const size = one.shape.reduce((a, b) => a * b, 1);
      start += size;
      return tf.tensor(numbers.slice(start - size, start), one.shape);
    });
    if (start !== numbers.length) {
      throw new Error(`${numbers.length} numbers for ${start}`);
    }
    model.setWeights(tensors);
    return {};
  },

  get({file}) {
    write(file, Float32Array.from(model.getWeights().flatMap((one) => Array.from(one.dataSync()))));
    return weights();
  },

  async save({folder, shards}) {
    fs.mkdirSync(folder, {recursive: true});
    await model.save(tf.io.withSaveHandler(async (artifacts) => {
      const data = Buffer.from(tf.io.CompositeArrayBuffer.join(artifacts.weightData));
      const size = Math.ceil(data.length / shards);
      const paths = [];
      for (let i = 0; i < shards; i++) {
        paths.push(shards === 1 ? 'weights.bin' : `group1-shard${i + 1}of${shards}.bin`);
        fs.writeFileSync(path.join(folder, paths[i]), data.subarray(i * size, (i + 1) * size));
      }
      const {modelTopology, format, generatedBy, convertedBy, weightSpecs} = artifacts;
      const weightsManifest = [{paths, weights: weightSpecs}];
      const json = {modelTopology, format, generatedBy, convertedBy, weightsManifest};
      fs.writeFileSync(path.join(folder, 'model.json'), JSON.stringify(json));
      return {modelArtifactsInfo: tf.io.getModelArtifactsInfoForJSON(artifacts)};
    }));
    return {file: path.join(folder, 'model.json')};
  },

  async load({file}) {
    const handler = {
      async load() {
        const json = JSON.parse(fs.readFileSync(file, 'utf8'));
        return tf.io.getModelArtifactsForJSON(json, async (manifest) => {
          const parts = manifest.flatMap((group) => group.paths);
          const bytes = Buffer.concat(parts.map((one) => fs.readFileSync(path.join(path.dirname(file), one))));
          const data = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
          return [tf.io.getWeightSpecs(manifest), data];
        });
      },
    };
    model = await tf.loadLayersModel(handler);
    return weights();
  },

  predict({inputs, file}) {
    const given = inputs.map((one) => tf.tensor(read(one.file, one.dtype), one.shape, one.dtype));
    // Cases side by side have batches of their own sizes, which predict would refuse; apply in turn gives one layer's
    // initial state to the next recurrent one.
    const alike = given.every((one) => one.shape[0] === given[0].shape[0]);
    const all = given.length > 1 ? given : given[0];
    const outputs = alike ? model.predict(all) : model.apply(all);
    const output = Array.isArray(outputs) ? outputs[outputs.length - 1] : outputs;
    write(file, output.dataSync());
    return {shape: output.shape};
  },
};

for await (const line of readline.createInterface({input: process.stdin})) {
  let answer;
  try {
    const {command, ...request} = JSON.parse(line);
    answer = await commands[command](request);
  } catch (error) {
    answer = {error: String(error.stack ?? error)};
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
