// Pictures of a GLB by three.js in headless Chromium: node show_glb.mjs <node_modules> <chromium> <job.json> <out folder>
// The job: {glb, size_px, background: [r, g, b], views: [{name, world: 16, projection: 16, unlit}], light: null or
// {file, width, height}}; matrices are column by column, the light is a float32 RGB equirectangular map, bottom row first.
// Writes <name>.png per view; prints {renderer, requests: addresses that were asked for, blocked: those refused}.
import fs from "node:fs";
import http from "node:http";
import path from "node:path";
import { createRequire } from "node:module";

const [modules, chromium, jobFile, out] = process.argv.slice(2);
const { chromium: browsers } = createRequire(path.resolve(modules, "x.js"))("playwright-core");
const job = JSON.parse(fs.readFileSync(jobFile, "utf8"));

const PAGE = `<!doctype html><meta charset="utf-8"><body style="margin:0"><script type="importmap">
{"imports": {"three": "/three/build/three.module.js", "three/addons/": "/three/examples/jsm/"}}
</script><script type="module" src="/page.js"></script>`;

const SCRIPT = `
import * as THREE from "three";
import { GLTFLoader } from "three/addons/loaders/GLTFLoader.js";

async function light(renderer, job) {
  if (!job.light) return null;
  const rgb = new Float32Array(await (await fetch("/light")).arrayBuffer());
  const rgba = new Float32Array(rgb.length / 3 * 4).fill(1);
  for (let i = 0; i < rgb.length / 3; i++) rgba.set(rgb.subarray(3 * i, 3 * i + 3), 4 * i);
  const map = new THREE.DataTexture(rgba, job.light.width, job.light.height, THREE.RGBAFormat, THREE.FloatType);
  map.mapping = THREE.EquirectangularReflectionMapping;
  map.colorSpace = THREE.LinearSRGBColorSpace;
  map.minFilter = map.magFilter = THREE.LinearFilter;
  map.needsUpdate = true;
  return new THREE.PMREMGenerator(renderer).fromEquirectangular(map).texture;
}

async function main() {
  const job = await (await fetch("/job.json")).json();
  const renderer = new THREE.WebGLRenderer({ antialias: false, preserveDrawingBuffer: true });
  renderer.setPixelRatio(1);
  renderer.setSize(job.size_px, job.size_px, false);
  const scene = new THREE.Scene();
  scene.background = new THREE.Color().setRGB(...job.background, THREE.SRGBColorSpace);
  scene.environment = await light(renderer, job);
  const asset = (await new GLTFLoader().loadAsync("/asset.glb")).scene;
  scene.add(asset);
  const lit = new Map(), plain = new Map();
  asset.traverse((node) => {
    if (!node.isMesh) return;
    lit.set(node, node.material);
    const { map, color, side } = node.material;
    plain.set(node, new THREE.MeshBasicMaterial({ map, color, side }));
  });
  const camera = new THREE.PerspectiveCamera();
  camera.matrixAutoUpdate = false;
  window.show = (view) => {
    for (const [node, material] of view.unlit ? plain : lit) node.material = material;
    camera.matrix.fromArray(view.world);
    camera.matrixWorldNeedsUpdate = true;
    camera.projectionMatrix.fromArray(view.projection);
    camera.projectionMatrixInverse.copy(camera.projectionMatrix).invert();
    renderer.render(scene, camera);
    return renderer.domElement.toDataURL("image/png");
  };
  const gl = renderer.getContext();
  const named = gl.getExtension("WEBGL_debug_renderer_info");
  return "three r" + THREE.REVISION + ", " + gl.getParameter(named ? named.UNMASKED_RENDERER_WEBGL : gl.RENDERER);
}
window.ready = main();
`;

const TYPES = { ".js": "text/javascript", ".html": "text/html", ".json": "application/json" };
const root = path.resolve(modules, "three");
const fixed = {
  "/": () => ["text/html", PAGE],
  "/page.js": () => ["text/javascript", SCRIPT],
  "/job.json": () => ["application/json", JSON.stringify(job)],
  "/asset.glb": () => ["model/gltf-binary", fs.readFileSync(job.glb)],
  "/light": () => ["application/octet-stream", fs.readFileSync(job.light.file)],
};

const server = http.createServer((request, response) => {
  const name = new URL(request.url, "http://localhost").pathname;
  try {
    if (!(name in fixed) && !name.startsWith("/three/")) throw new Error("unknown address");
    const file = path.join(root, name.slice("/three".length));
    const [type, body] = fixed[name]?.() ?? [TYPES[path.extname(file)], fs.readFileSync(file)];
    response.writeHead(200, { "content-type": type ?? "application/octet-stream" }).end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const home = `http://127.0.0.1:${server.address().port}/`;

const browser = await browsers.launch({
  executablePath: chromium,
  args: ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"],
});
try {
  const page = await browser.newPage();
  const requests = [], blocked = [], faults = [];
  page.on("pageerror", (error) => faults.push(String(error)));
  await page.route("**/*", (route) => {
    const address = route.request().url();
    const own = address.startsWith(home) || address.startsWith("blob:") || address.startsWith("data:");
    (own ? requests : blocked).push(address);
    return own ? route.continue() : route.abort();
  });
  for (let attempt = 0; ; attempt++) {
    try {
      await page.goto(home);
      break;
    } catch (error) {
      // Chromium drops requests while the machine's network interfaces change, as containers start and stop.
      if (attempt === 4 || !String(error).includes("net::ERR_")) throw error;
      await new Promise((later) => setTimeout(later, 500));
    }
  }
  const renderer = await page.evaluate(() => window.ready).catch((error) => {
    throw new Error([String(error), ...faults].join("\n"));
  });
  for (const view of job.views) {
    const picture = await page.evaluate((one) => window.show(one), view);
    fs.writeFileSync(path.join(out, `${view.name}.png`), Buffer.from(picture.split(",")[1], "base64"));
  }
  console.log(JSON.stringify({ renderer, requests, blocked }));
} finally {
  await browser.close();
  server.close();
}
