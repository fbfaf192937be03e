export const dynamic = "force-dynamic";

let visits = 0;

export async function POST() {
  visits += 1;
  return Response.json({ visits });
}
