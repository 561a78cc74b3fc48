// Opens a page in a browser and says twenty times a second, in a line of JSON each, what the
// page's `state` is. It ends with its standard input.
//
//	node hold.mjs BROWSER URL PIN
//
// PIN is the SHA-256 of the only public key, in base64, that is believed although nobody vouches
// for it.
import { chromium } from "playwright-core";

const [executablePath, url, pin] = process.argv.slice(2);
const browser = await chromium.launch({
	executablePath,
	args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--ignore-certificate-errors-spki-list=" + pin],
});
let over = false;
process.stdin.resume();
process.stdin.on("end", async () => {
	over = true;
	await browser.close();
	process.exit(0);
});
try {
	const page = await browser.newPage();
	await page.goto(url);
	while (!over) {
		console.log(JSON.stringify(await page.evaluate(() => state)));
		await page.waitForTimeout(50);
	}
} catch (err) {
	if (!over) {
		console.error(err);
		process.exit(1);
	}
}
