const http = require("http");
const { chromium } = require("playwright-core");

async function main() {
  const browser = await chromium.launch({
    executablePath: "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
    timeout: 240000,
  });
  const page = await browser.newPage({ viewport: { width: 640, height: 480 } });
  page.setDefaultTimeout(120000);
  await page.setContent("<title>empty</title>");

  const server = http.createServer(async (request, response) => {
    try {
      let body = "";
      for await (const piece of request) body += piece;
      switch (`${request.method} ${request.url}`) {
        case "PUT /page":
          await page.setContent(body);
          return response.end(await page.title());
        case "POST /evaluate":
          return response.end(JSON.stringify(await page.evaluate(body)));
        case "GET /screenshot":
          response.setHeader("Content-Type", "image/png");
          return response.end(await page.screenshot());
        default:
          return response.writeHead(404).end();
      }
    } catch (error) {
      response.writeHead(500).end(String(error));
    }
  });
  server.listen(3000, "0.0.0.0");
}

main();
