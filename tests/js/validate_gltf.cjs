// Validate glTF files with the Khronos validator: node validate_gltf.cjs <node_modules> FILE...
// Prints one JSON object: {file: [{severity, code, pointer, message}, ...]}; severity 0 error, 1 warning, 2 info, 3 hint.
const fs = require("fs");
const path = require("path");

const [modules, ...files] = process.argv.slice(2);
const validator = require(path.resolve(modules, "gltf-validator"));

async function validate(file) {
  const report = await validator.validateBytes(new Uint8Array(fs.readFileSync(file)), {
    uri: path.basename(file),
    maxIssues: 0,
    externalResourceFunction: async (uri) =>
      new Uint8Array(fs.readFileSync(path.join(path.dirname(file), decodeURIComponent(uri)))),
  });
  return report.issues.messages;
}

(async () => {
  const found = {};
  for (const file of files) found[file] = await validate(file);
  console.log(JSON.stringify(found));
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
