// Drive the interface as people would: node ui.cjs <node_modules> <chromium> <url> <folder for pictures and downloads>
// Prints one JSON object of what was seen; tests/slow/test_ui_browser.py judges it.
const path = require("path");

const [modules, chromium, url, out] = process.argv.slice(2);
const playwright = require(path.resolve(modules, "playwright-core"));
const LONG = 240000; // a loaded machine is slow; nothing here waits for a fixed time
const seen = { external: [], errors: [], refused: [] };

async function visitor(browser, width = 1280, height = 900) {
  const context = await browser.newContext({ viewport: { width, height }, acceptDownloads: true });
  const page = await context.newPage();
  page.setDefaultTimeout(LONG);
  page.on("request", (request) => {
    const own = request.url().startsWith(url) || /^(data|blob):/.test(request.url());
    if (!own) seen.external.push(request.url());
  });
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  page.on("response", (response) => {
    if (response.status() >= 400) seen.refused.push(`${response.status()} ${response.url()}`);
  });
  return page;
}

async function open(page, address = url) {
  await page.goto(address);
  await page.waitForSelector("#create");
  await page.waitForSelector("#prompt textarea");
}

async function fill(page, prompt, steps) {
  await page.fill("#prompt textarea", prompt);
  await page.getByText("Quick", { exact: false }).first().click();
  if (!(await page.getByLabel("Steps", { exact: true }).isVisible())) {
    await page.getByRole("button", { name: "More options" }).click();
  }
  await page.getByLabel("Steps", { exact: true }).fill(String(steps));
  await page.getByLabel("Steps", { exact: true }).press("Tab");
}

const status = (page) => page.locator("#progress .pill").first();

async function reaches(page, word) {
  await page.waitForFunction(
    (wanted) => document.querySelector("#progress .pill")?.textContent === wanted, word, { timeout: LONG });
}

async function pictures(page, count) {
  const found = new Set();
  const times = [];
  await page.waitForSelector(".orbit");
  while (found.size < count) {
    const image = await page.evaluate(() => document.querySelector(".orbit")?.style.backgroundImage ?? "");
    if (image && !found.has(image)) {
      found.add(image);
      times.push(Date.now());
    }
    await page.waitForTimeout(50);
  }
  return { distinct: found.size, between_ms: times.slice(1).map((time, i) => time - times[i]) };
}

async function drawn(page, selector, file) {
  const canvas = page.locator(`${selector} canvas`).first();
  await canvas.waitFor({ state: "visible" });
  const box = path.join(out, file);
  const end = Date.now() + 90000; // loading a model takes a moment, and pictures of it too
  let before = 0;
  for (let calm = 0; calm < 3 && Date.now() < end; ) {
    const size = (await canvas.screenshot({ path: box })).length;
    // Gaussians appear bit by bit: wait until the picture no longer grows.
    calm = size >= 12000 && size <= 1.02 * before ? calm + 1 : 0;
    before = size;
    await page.waitForTimeout(500);
  }
  return box;
}

async function firstUser(browser) {
  const page = await visitor(browser);
  await open(page);
  seen.focused = await page.evaluate(() => document.activeElement.tagName);
  await page.click("#create");
  await page.waitForSelector("#message .notice-error");
  seen.empty_prompt = await page.textContent("#message");
  await page.fill("#prompt textarea", "a yellow dragon");
  await page.waitForSelector("#hints .notice-warning");
  seen.unknown_word = await page.textContent("#hints");
  await page.fill("#prompt textarea", "<img src=x onerror=window.hacked=1> duck");
  await page.waitForFunction(() => document.querySelector("#hints")?.textContent.includes("onerror"));
  await page.screenshot({ path: path.join(out, "start.png") });
  await fill(page, "a yellow duck", 5000);
  let tabs = 0;
  await page.focus("#prompt textarea");
  while ((await page.evaluate(() => document.activeElement.id)) !== "create" && tabs < 40) {
    await page.keyboard.press("Tab");
    tabs += 1;
  }
  seen.tabs_to_create = tabs;
  await page.keyboard.press("Enter");
  seen.live = await pictures(page, 4);
  await page.screenshot({ path: path.join(out, "live.png") });
  return page;
}

async function secondUser(browser) {
  const page = await visitor(browser);
  await open(page);
  await page.locator("#progress", { hasText: "duck" }).waitFor({ timeout: 20000 }).catch(() => {}); // judged below
  seen.second_tab = await page.locator("#progress").textContent(); // attached to what runs
  await page.getByRole("button", { name: "As YAML or command" }).click();
  await page.locator("#yaml .cm-content").click();
  await page.keyboard.press("Control+A");
  await page.keyboard.insertText("extends: gaussians\nprompt: a red mug\nsteps: 20\nseed: 4\n");
  await page.getByRole("button", { name: "Apply YAML" }).click();
  await page.waitForFunction(() => document.querySelector("#prompt textarea").value === "a red mug");
  await page.waitForFunction(() => /--config gaussians/.test(document.querySelector("#command textarea").value));
  seen.command = await page.inputValue("#command textarea");
  await page.click("#create");
  await page.waitForFunction(() => /ahead|next/.test(document.querySelector("#progress")?.textContent ?? ""));
  seen.waiting = await page.locator("#progress").textContent();
  await page.waitForSelector("#queue .queue li:nth-child(2)");
  seen.queue = await page.locator("#queue").innerText();
  return page;
}

async function stopAndKeep(page) {
  const address = page.url();
  await open(page, address);
  await page.waitForSelector("#progress .pill-running");
  seen.after_reload = { text: await page.locator("#progress").textContent(), url: address };
  await page.waitForSelector("#stop");
  await page.click("#stop");
  await reaches(page, "stopped");
  seen.stopped = await page.locator("#progress").textContent();
  await page.waitForSelector("#resume");
  seen.resume_offered = true;
  await drawn(page, "#viewer", "model.png");
  await page.screenshot({ path: path.join(out, "stopped.png"), fullPage: true });
  const [download] = await Promise.all([page.waitForEvent("download"), page.click("#downloads a.first")]);
  seen.download_name = download.suggestedFilename();
  await download.saveAs(path.join(out, "download.glb"));
  await open(page, address);
  await drawn(page, "#viewer", "again.png");
  seen.prompt_after_reload = await page.inputValue("#prompt textarea");
}

async function lookAndExport(page) {
  await page.getByRole("tab", { name: "Looks" }).click();
  const source = () => page.evaluate(() => document.querySelector("#look-picture img")?.src);
  await page.waitForSelector("#look-picture img");
  const found = [await source()];
  for (const look of ["base colour", "normals", "clay"]) {
    await page.locator("#look").getByText(look).click();
    await page.waitForFunction((old) => document.querySelector("#look-picture img")?.src !== old, found.at(-1));
    found.push(await source());
  }
  seen.looks = new Set(found).size;
  await page.getByRole("tab", { name: "Figures" }).click();
  seen.figures = await page.locator("#results").innerText();
  await page.getByRole("tab", { name: "Export again" }).click();
  await page.getByLabel("obj").check();
  await page.locator("#faces input[type=number]").fill("1000");
  await page.locator("#faces input[type=number]").press("Tab");
  await page.click("#export-again");
  await page.waitForFunction(() => /OBJ/.test(document.querySelector("#downloads")?.textContent ?? ""));
  const [download] = await Promise.all([page.waitForEvent("download"), page.getByRole("link", { name: "OBJ" }).click()]);
  await download.saveAs(path.join(out, "download.zip"));
}

async function drawer(page) {
  await page.getByRole("button", { name: "Advanced settings" }).click();
  await page.locator("#part input").click();
  await page.getByRole("option", { name: "guidance" }).click();
  const field = page.getByLabel("cfg_scale");
  await field.waitFor();
  await field.fill("6.5");
  await field.press("Tab");
  await page.locator("#advanced .facts", { hasText: "6.5" }).waitFor();
  await page.getByRole("button", { name: "As YAML or command" }).click();
  await page.waitForSelector("#command textarea");
  await page.screenshot({ path: path.join(out, "drawer.png"), fullPage: true });
  seen.drawer = await page.inputValue("#command textarea");
}

async function gaussians(page) {
  await reaches(page, "finished");
  await drawn(page, "#viewer", "second.png");
  await page.getByRole("tab", { name: "Gaussians" }).click();
  await drawn(page, "#splats", "splats.png");
  await page.context().close(); // viewers draw all the time, and software rendering shares the cores
}

async function gallery(page) {
  await page.getByRole("tab", { name: "Gallery" }).click();
  await page.waitForSelector("#cards .cards li:nth-child(2)");
  seen.cards = await page.locator("#cards .cards li").count();
  await page.waitForTimeout(500);
  await page.screenshot({ path: path.join(out, "gallery.png") });
  await page.locator("#search textarea, #search input").fill("mug");
  await page.waitForFunction(() => document.querySelectorAll("#cards .cards li").length === 1);
  await page.locator("#search textarea, #search input").fill("");
  await page.waitForFunction(() => document.querySelectorAll("#cards .cards li").length === 2);
  await page.getByRole("button", { name: "Compare two runs" }).click();
  for (const [label, prompt] of [["Left", "duck"], ["Right", "mug"]]) {
    await page.getByLabel(label, { exact: true }).click();
    await page.getByRole("option", { name: prompt }).first().click();
  }
  await page.waitForSelector(".compare section:nth-child(2)");
  seen.compared = await page.locator(".compare").count();
  await page.screenshot({ path: path.join(out, "compare.png"), fullPage: true });
  await page.locator("#cards a", { hasText: "mug" }).click();
  await page.waitForFunction(() => /red-mug/.test(window.location.search));
  await page.getByRole("tab", { name: "Gallery" }).click();
  await page.getByRole("button", { name: "Delete a run" }).click();
  await page.getByLabel("Run", { exact: true }).click();
  await page.getByRole("option", { name: "mug" }).first().click();
  await page.getByRole("button", { name: "Delete …" }).click();
  await page.waitForSelector("#delete-yes");
  seen.asked_before_delete = (await page.locator("#cards .cards li").count()) === 2;
  await page.click("#delete-yes");
  await page.waitForFunction(() => document.querySelectorAll("#cards .cards li").length === 1);
}

async function phone(browser, address) {
  const page = await visitor(browser, 390, 844);
  await open(page, address);
  await page.waitForSelector("#viewer canvas");
  await drawn(page, "#viewer", "phone-model.png");
  seen.phone_overflow_px = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  await page.screenshot({ path: path.join(out, "phone.png") });
  await page.context().close();
}

(async () => {
  const browser = await playwright.chromium.launch({
    executablePath: chromium,
    args: ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"],
  });
  const first = await firstUser(browser);
  const second = await secondUser(browser);
  await stopAndKeep(first);
  await gaussians(second);
  await lookAndExport(first);
  await drawer(first);
  const address = first.url();
  await first.goto("about:blank");
  await phone(browser, address);
  await open(first, address);
  await gallery(first);
  seen.hacked = await first.evaluate(() => window.hacked ?? null);
  await browser.close();
  console.log(JSON.stringify(seen));
})().catch((error) => {
  console.error(error);
  console.error(JSON.stringify(seen));
  process.exit(1);
});
